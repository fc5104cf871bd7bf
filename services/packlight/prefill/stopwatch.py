"""How long work took where it was done: on the host by its clock, on a GPU by events in its stream.

A GPU works behind the host's back: the host's clock says only how long it took to ask for the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Adds up pieces of work. For one thread."""

    def running(self) -> AbstractContextManager[None]:
        """What is begun inside counts."""
        ...

    def read_s(self) -> float:
        """Of all pieces, once the last one is done: until then it waits."""
        ...


class Event(Protocol):
    """As `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class HostWatch:
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._total_s = clock, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:
            self._total_s += self._clock() - started

    def read_s(self) -> float:
        return self._total_s


class DeviceWatch:
    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make_event = make_event
        self._pieces: list[tuple[Event, Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, end = self._make_event(), self._make_event()
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._pieces.append((begin, end))

    def read_s(self) -> float:
        if self._pieces:
            self._pieces[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._pieces) / 1e3


def stopwatch(device: torch.device) -> Stopwatch:
    """For work on `device`, in its current stream."""
    return HostWatch() if device.type == "cpu" else DeviceWatch(partial(torch.cuda.Event, enable_timing=True))
