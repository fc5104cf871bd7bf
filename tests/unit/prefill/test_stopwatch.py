"""Work is timed where it is done."""

import pytest
import torch

from packlight.prefill.stopwatch import DeviceWatch, HostWatch, stopwatch


class Stream:
    """A device that does what it is asked for at `now_ms`, which nobody but it knows before an event is waited for."""

    def __init__(self):
        self.now_ms, self.waited_for = 0.0, []

    def event(self):
        stream = self

        class Event:
            def record(self):
                self.at_ms = stream.now_ms

            def synchronize(self):
                stream.waited_for.append(self.at_ms)

            def elapsed_time(self, end):
                return end.at_ms - self.at_ms

        return Event()


def test_the_host_counts_what_is_inside_and_what_fails_too():
    times = iter([1.0, 3.0, 10.0, 10.5])
    watch = HostWatch(lambda: next(times))
    with watch.running():
        pass
    with pytest.raises(KeyError), watch.running():
        raise KeyError
    assert watch.read_s() == 2.5


def test_a_device_is_asked_in_the_end_and_waited_for_once():
    stream = Stream()
    watch = DeviceWatch(stream.event)
    assert watch.read_s() == 0.0
    for wait_ms, took_ms in ((5.0, 2.0), (100.0, 30.0)):
        stream.now_ms += wait_ms
        with watch.running():
            stream.now_ms += took_ms
    assert not stream.waited_for
    assert watch.read_s() == pytest.approx(0.032)
    assert stream.waited_for == [137.0]


def test_a_cpu_needs_no_events():
    assert isinstance(stopwatch(torch.device("cpu")), HostWatch)
