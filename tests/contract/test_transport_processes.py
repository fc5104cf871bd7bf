"""Transports beside the stream, between two real processes: many shipments at once, cancellation, death, and leaks.

Here is one end, the other is `tests/support/transport_peer.py`. Bytes that a link does not carry go inline, so nothing
is ever lost: what is tested is also that they do *not* go inline while the link is well.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from packlight.core.errors import ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer.base import Site
from packlight.transfer.links import DROPPED, MADE, PATIENCE_S
from packlight.transfer.registry import build_transport, connect, wish
from packlight.wire.frames import event_from_bytes
from tests.support.cluster import eventually
from tests.support.transport_peer import draw, payload

pytestmark = pytest.mark.e2e

WAIT_S = 120.0  # for what is a matter of milliseconds, unless the library or the machine has a bad minute
SIZES = [70_000, 1, 0, 300_001, 4096]
NOTICED_WITHIN_S = PATIENCE_S + 15.0  # what is not noticed stays so for ever; a busy machine takes its time


class Peer:
    """The other process."""

    def __init__(self, name: str, staging_bytes: int = 64 << 20) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.support.transport_peer", name, str(staging_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, do: str, **arguments):
        self.popen.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.popen.pid, number)
        if number == signal.SIGKILL:
            self.popen.wait()

    def end(self) -> int:
        self.popen.stdin.close()
        self.popen.stdout.close()
        return self.popen.wait(WAIT_S)


@contextmanager
def peer_process(name):
    peer = Peer(name)
    try:
        yield peer
    finally:
        if peer.popen.poll() is None:
            peer.popen.kill()
        peer.popen.wait()
        for pipe in (peer.popen.stdin, peer.popen.stdout):
            pipe.close()


class End:
    """This process's transport, and what happened to its links."""

    def __init__(self, name: str) -> None:
        self.name, self.events = name, []
        site = Site(staging_bytes=64 << 20, on_link=lambda transport, event: self.events.append(event))
        self.transport = build_transport(name, site)

    def receivers(self, num, sizes=SIZES):
        return [self.transport.receiver(num_layers=len(sizes), max_layer_bytes=max(sizes)) for _ in range(num)]

    def wishes(self, receivers):
        return [wish(self.name, receiver) for receiver in receivers]

    def sender(self, wanted):
        """Of the transport itself, once its link is there."""
        _, sender = connect([wanted], {self.name: self.transport})
        sender.ready.result(WAIT_S)
        return sender


@pytest.fixture(params=["nixl", "process_group"], scope="module")
def name(request):
    try:
        transport = build_transport(request.param)
        transport.receiver(num_layers=1, max_layer_bytes=1).release(unused=True)
    except ShipmentIncompatible as error:
        pytest.skip(error.message)
    transport.close()
    return request.param


@pytest.fixture(scope="module")
def peer(name):
    """For tests that do it no harm."""
    with peer_process(name) as peer:
        yield peer
        assert peer.end() == 0


@pytest.fixture
def end(name):
    end = End(name)
    yield end
    since = time.monotonic()
    end.transport.close()
    assert time.monotonic() - since < NOTICED_WITHIN_S
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("packlight-")]


def take_all(receivers, frames):
    """(shipment, layer) -> payload of what arrived, all of it beside the stream."""
    arrived = {}
    for number, frame in frames:
        header = event_from_bytes(bytes.fromhex(frame))
        assert isinstance(header, LayerHeader)
        assert header.offset is not None
        received = receivers[number].take(header)
        arrived[number, received.layer] = received.payload.clone()
    return arrived


def num_open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ── while all is well ────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_shipments_at_once_arrive_whole_and_share_one_link(end, peer):
    receivers = end.receivers(8)
    arrived = take_all(receivers, peer("send", wishes=end.wishes(receivers), sizes=SIZES)["frames"])
    assert len(arrived) == 8 * len(SIZES)
    for (number, layer), found in arrived.items():
        assert found.equal(payload(SIZES[layer], 1000 * number + layer))
    for receiver in receivers:
        receiver.release()
    assert end.events in ([], [MADE])  # a receiver of `nixl` does not know


def test_the_other_way_round(end, peer):
    offer = peer("offer", layers=len(SIZES), bytes=max(SIZES))
    sender = end.sender(offer["wish"])
    begun = [sender.frames(layer, (1,), payload(size, layer)) for layer, size in enumerate(SIZES)]
    for layer, frames in enumerate(begun):
        (frame,) = draw(frames)
        taken = peer("take", id=offer["id"], frame=frame.hex())
        assert taken["layer"] == layer
    sender.release()
    assert end.events == [MADE]


def test_shipments_that_are_cancelled_do_not_disturb_others(end, peer):
    sizes = [200_000] * 6
    receivers = end.receivers(6, sizes)
    wishes = end.wishes(receivers)
    for receiver in receivers[::2]:
        receiver.release()  # before anything is sent: its bytes are not wanted any more
    frames = peer("send", wishes=wishes, sizes=sizes)["frames"]
    wanted = [(number, frame) for number, frame in frames if number % 2]
    assert len(take_all(receivers, wanted)) == 3 * 6
    for receiver in receivers:
        receiver.release()
    (late,) = end.receivers(1)
    assert len(take_all([late], peer("send", wishes=end.wishes([late]), sizes=SIZES)["frames"])) == len(SIZES)
    late.release()
    assert DROPPED not in end.events


def test_a_sender_that_is_cancelled_leaves_nothing_under_way(end, peer):
    offers = [peer("offer", layers=3, bytes=8 << 20) for _ in range(3)]
    for offer in offers[:2]:
        sender = end.sender(offer["wish"])
        for layer in range(3):
            sender.frames(layer, (1,), payload(8 << 20, layer))
        sender.release()
    sender = end.sender(offers[2]["wish"])
    (frame,) = draw(sender.frames(0, (1,), payload(1000, 0)))
    assert peer("take", id=offers[2]["id"], frame=frame.hex())["layer"] == 0
    sender.release()
    assert end.events == [MADE]


def test_nothing_is_left_of_shipments(end, peer):
    def ship():
        receivers = end.receivers(4)
        take_all(receivers, peer("send", wishes=end.wishes(receivers), sizes=SIZES)["frames"])
        for receiver in receivers:
            receiver.release()
        peer("release")

    for _ in range(3):
        ship()
    before, num_threads, num_files = peer("facts"), threading.active_count(), num_open_files()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        ship()
    after = peer("facts")
    assert after["threads"] <= before["threads"]
    assert after["fds"] <= before["fds"]
    assert threading.active_count() <= num_threads
    assert num_open_files() <= num_files
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 40 << 10  # KiB


# ── death ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def between_hosts(monkeypatch):
    """UCX as between two hosts. On one it copies from process to process, and need not ask the other."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.mark.usefixtures("between_hosts")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_receiver_that_dies_is_noticed_and_the_rest_goes_inline(name, end, number):
    with peer_process(name) as peer:
        offer = peer("offer", layers=9, bytes=8 << 20)
        sender = end.sender(offer["wish"])
        draw(sender.frames(0, (1,), payload(1000, 0)))
        peer.signal(number)
        since = time.monotonic()
        begun = [sender.frames(layer, (1,), payload(8 << 20, layer)) for layer in range(1, 4)]
        for layer, frames in enumerate(begun, 1):
            header, *chunks = (event_from_bytes(frame) for frame in draw(frames))
            assert header.offset is None
            assert b"".join(chunk.data for chunk in chunks) == payload(8 << 20, layer).numpy().tobytes()
            assert all(isinstance(chunk, Chunk) for chunk in chunks)
        assert time.monotonic() - since < NOTICED_WITHIN_S
        sender.release()
        assert end.events == [MADE, DROPPED]
        found, inline = connect([offer["wish"], "grpc"], {name: end.transport, "grpc": build_transport("grpc")})
        inline.release()
        assert found == "grpc"


@pytest.mark.usefixtures("between_hosts")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_sender_that_dies_holds_up_nobody(name, end, number):
    sizes = [8 << 20] * 6
    with peer_process(name) as dying, peer_process(name) as other:
        (receiver,) = end.receivers(1, sizes)
        dying("start", wish=end.wishes([receiver])[0], sizes=sizes)
        dying.signal(number)
        receiver.release()
        receivers = end.receivers(2)
        assert len(take_all(receivers, other("send", wishes=end.wishes(receivers), sizes=SIZES)["frames"])) == 10
        for each in receivers:
            each.release()
        if number == signal.SIGKILL and name == "process_group":
            eventually(lambda: DROPPED in end.events, NOTICED_WITHIN_S)
        assert other.end() == 0
