"""Every KV transport: bytes equal, one terminal state, and no foreign byte believed.

The sender and the receiver are joined by the link they are made for: in-process frames stay objects, all others pass
through the bytes of the prefill stream. Peer death and timeouts are the stream's, see `test_prefill_client.py`; what
transports beside the stream make of it is in `test_transport_processes.py`.
"""

from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packlight.core.errors import ConfigError, ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer import inline
from packlight.transfer.base import Site
from packlight.transfer.links import LinkSender
from packlight.transfer.registry import TRANSPORTS, build_transport, connect, wish
from packlight.wire.frames import event_from_bytes, event_to_bytes

MAX_BYTES = 4 << 20
WAIT_S = 120.0  # for what is a matter of milliseconds, unless the library or the machine has a bad minute


@pytest.fixture(params=sorted(TRANSPORTS), scope="module")
def transport(request):
    """One per module: those that make links make them once."""
    made = Transport(request.param)
    try:
        made.ends.receiver(num_layers=1, max_layer_bytes=1).release(unused=True)
    except ShipmentIncompatible as error:
        pytest.skip(error.message)  # a library that is not installed
    yield made
    made.ends.close()


class Transport:
    def __init__(self, name):
        self.name, self.ends = name, build_transport(name, Site(staging_bytes=1 << 30))

    def joined(self, **receiver):
        return joined(self.name, self.ends, **receiver)


def frames_of(frames):
    """Waits where they do."""
    for frame in frames:
        if isinstance(frame, Future):
            frame.exception(timeout=WAIT_S)
        else:
            yield frame


def carry(transport, frames):
    crossing = transport.name != "inproc"
    return [event_from_bytes(event_to_bytes(frame)) if crossing else frame for frame in frames_of(frames)]


def payload(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def receive_all(receiver, frames):
    return [received for frame in frames if (received := receiver.take(frame)) is not None]


@contextmanager
def joined(name, ends, *, num_layers=1, max_layer_bytes=MAX_BYTES):
    """(sender, receiver), as two workers would find each other, once there is a link where there is to be one."""
    receiver = ends.receiver(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
    found, sender = connect([wish(name, receiver)], {name: ends})
    assert found == name
    if isinstance(sender, LinkSender):
        sender.ready.result(timeout=WAIT_S)
    try:
        yield sender, receiver
    finally:
        for end in (sender, receiver, sender, receiver):
            end.release()  # twice


@pytest.mark.parametrize("sizes", [[0], [1], [1 << 20, 5], [(1 << 20) + 1, 0, 3 << 20]])
def test_bytes_arrive_equal_and_in_order(transport, sizes):
    with transport.joined(num_layers=len(sizes)) as (sender, receiver):
        for layer, size in enumerate(sizes):
            data = payload(size, layer)
            (received,) = receive_all(receiver, carry(transport, sender.frames(layer, (size, 7), data)))
            assert (received.layer, received.lengths) == (layer, (size, 7))
            assert torch.equal(received.payload, data)


def test_layers_may_all_be_on_their_way_before_the_first_is_taken(transport):
    sizes = [5000, 0, 70_000, 1]
    with transport.joined(num_layers=4) as (sender, receiver):
        sent = [carry(transport, sender.frames(layer, (1,), payload(size))) for layer, size in enumerate(sizes)]
        for frames, size in zip(sent, sizes, strict=True):
            (received,) = receive_all(receiver, frames)
            assert torch.equal(received.payload, payload(size))


def test_what_was_received_outlives_the_transport(transport):
    with transport.joined() as (sender, receiver):
        (received,) = receive_all(receiver, carry(transport, sender.frames(0, (1,), payload(9000))))
    assert torch.equal(received.payload, payload(9000))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_were_not_announced_are_found(transport, data):
    """Any byte, any bit: a payload under the header of another that differs from it by one bit."""
    original = payload(data.draw(st.integers(1, 3000)))
    flipped = original.clone()
    flipped[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with transport.joined() as (sender, receiver), transport.joined() as (other, _):
        announced = next(frames_of(other.frames(0, (1,), original)))
        header, *chunks = frames_of(sender.frames(0, (1,), flipped))
        lying = replace(header, checksum=announced.checksum)
        with pytest.raises(ShipmentCorrupt, match="checksum"):
            receive_all(receiver, carry(transport, [lying, *chunks]))


def test_a_layer_out_of_order_is_refused(transport):
    with transport.joined(num_layers=2) as (sender, receiver):
        frames = carry(transport, sender.frames(1, (1,), payload(8)))
        with pytest.raises(ShipmentCorrupt, match="layer 1 arrived where layer 0 was due"):
            receive_all(receiver, frames)


def test_a_layer_sent_twice_is_refused(transport):
    with transport.joined(num_layers=2) as (sender, receiver):
        receive_all(receiver, carry(transport, sender.frames(0, (1,), payload(8))))
        with pytest.raises(ShipmentCorrupt, match="layer 0 arrived where layer 1 was due"):
            receive_all(receiver, carry(transport, sender.frames(0, (1,), payload(8))))


def test_one_layer_too_many_is_refused(transport):
    with transport.joined() as (sender, receiver):
        receive_all(receiver, carry(transport, sender.frames(0, (1,), payload(8))))
        with pytest.raises(ShipmentCorrupt):
            receive_all(receiver, carry(transport, sender.frames(1, (1,), payload(8))))


def test_a_layer_larger_than_possible_is_refused_before_its_bytes(transport):
    with transport.joined(max_layer_bytes=100) as (sender, receiver):
        header = next(frames_of(sender.frames(0, (1,), payload(4096))))
        with pytest.raises(ShipmentCorrupt, match="at most 100"):
            receiver.take(header)


def test_missing_bytes_are_found_when_the_next_layer_starts(transport):
    with transport.joined(num_layers=2) as (_, receiver):
        receiver.take(LayerHeader(0, (1,), 64, 0))
        with pytest.raises(ShipmentCorrupt, match="of 64 bytes"):
            receiver.take(LayerHeader(1, (1,), 8, 0))


def test_bytes_nobody_announced_are_refused(transport):
    with transport.joined() as (_, receiver), pytest.raises(ShipmentCorrupt):
        receiver.take(Chunk(b"stray"))


def test_inline_chunks_are_about_a_mebibyte():
    frames = list(inline.InlineSender().frames(0, (1,), payload((2 << 20) + 5)))
    assert [len(frame.data) for frame in frames[1:]] == [1 << 20, 1 << 20, 5]


def test_frames_are_made_when_they_are_asked_for(transport):
    """Making them costs a checksum and perhaps a copy, which is for the reader's thread to do, or for a link's."""
    if transport.name in ("nixl", "process_group"):
        pytest.skip("its link's thread begins at once")
    with transport.joined() as (sender, receiver):
        data = payload(100)
        frames = sender.frames(0, (1,), data)
        data.zero_()
        (received,) = receive_all(receiver, carry(transport, frames))
        assert not received.payload.any()


def test_the_first_transport_that_reaches_its_receiver_is_taken():
    known = {name: build_transport(name) for name in ("shm", "inproc", "grpc")}
    for wanted in (("pigeon:3", "grpc", "inproc"), ("shm:1.2.3.aa", "grpc"), ("shm", "grpc")):
        name, sender = connect(wanted, known)
        sender.release()
        assert name == "grpc"


def test_refusing_names_both_lists_and_what_does_not_reach():
    known = {name: build_transport(name) for name in ("inproc", "grpc")}
    with pytest.raises(ShipmentIncompatible, match=r"takes shm, pigeon.*offers inproc, grpc"):
        connect(("shm:secret", "pigeon"), known)
    with pytest.raises(ShipmentIncompatible, match=r"takes shm, prefill offers shm; shm: .*no offer"):
        connect(("shm",), {"shm": build_transport("shm")})
    with pytest.raises(ConfigError, match="grpc"):
        build_transport("pigeon")
