"""Every KV transport: bytes equal, one terminal state, and no foreign byte believed.

The sender and the receiver are joined by the link they are made for: in-process frames stay objects, all others pass
through the bytes of the prefill stream. Peer death and timeouts are the stream's: see `test_prefill_client.py`.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packlight.core.errors import ConfigError, ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer import inline
from packlight.transfer.registry import TRANSPORTS, build_transport, choose
from packlight.wire.frames import event_from_bytes, event_to_bytes

MAX_BYTES = 4 << 20


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request):
    return request.param


def carry(name, frames):
    return [frame if name == "inproc" else event_from_bytes(event_to_bytes(frame)) for frame in frames]


def payload(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def receive_all(receiver, frames):
    return [received for frame in frames if (received := receiver.take(frame)) is not None]


@pytest.mark.parametrize("sizes", [[0], [1], [1 << 20, 5], [(1 << 20) + 1, 0, 3 << 20]])
def test_bytes_arrive_equal_and_in_order(transport, sizes):
    ends = build_transport(transport)
    sender, receiver = ends.sender(), ends.receiver(num_layers=len(sizes), max_layer_bytes=MAX_BYTES)
    for layer, size in enumerate(sizes):
        data = payload(size, layer)
        (received,) = receive_all(receiver, carry(transport, sender.frames(layer, (size, 7), data)))
        assert (received.layer, received.lengths) == (layer, (size, 7))
        assert torch.equal(received.payload, data)
    for end in (sender, receiver, sender, receiver):
        end.release()  # twice


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(transport, data):
    ends = build_transport(transport)
    original = payload(data.draw(st.integers(1, 3000)))
    frames = list(ends.sender().frames(0, (1,), original))
    original[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    receiver = ends.receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    with pytest.raises(ShipmentCorrupt, match="checksum"):
        receive_all(receiver, carry(transport, frames))


def test_a_layer_out_of_order_is_refused(transport):
    ends = build_transport(transport)
    frames = carry(transport, ends.sender().frames(1, (1,), payload(8)))
    with pytest.raises(ShipmentCorrupt, match="layer 1 arrived where layer 0 was due"):
        receive_all(ends.receiver(num_layers=2, max_layer_bytes=MAX_BYTES), frames)


def test_a_layer_sent_twice_is_refused(transport):
    ends = build_transport(transport)
    receiver = ends.receiver(num_layers=2, max_layer_bytes=MAX_BYTES)
    for _ in receive_all(receiver, carry(transport, ends.sender().frames(0, (1,), payload(8)))):
        pass
    with pytest.raises(ShipmentCorrupt, match="layer 0 arrived where layer 1 was due"):
        receive_all(receiver, carry(transport, ends.sender().frames(0, (1,), payload(8))))


def test_one_layer_too_many_is_refused(transport):
    ends = build_transport(transport)
    receiver = ends.receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    receive_all(receiver, carry(transport, ends.sender().frames(0, (1,), payload(8))))
    with pytest.raises(ShipmentCorrupt):
        receive_all(receiver, carry(transport, ends.sender().frames(1, (1,), payload(8))))


def test_a_layer_larger_than_possible_is_refused_before_its_bytes(transport):
    ends = build_transport(transport)
    header = next(iter(ends.sender().frames(0, (1,), payload(4096))))
    with pytest.raises(ShipmentCorrupt, match="at most 100"):
        ends.receiver(num_layers=1, max_layer_bytes=100).take(header)


def test_missing_bytes_are_found_when_the_next_layer_starts(transport):
    ends = build_transport(transport)
    sender, receiver = ends.sender(), ends.receiver(num_layers=2, max_layer_bytes=MAX_BYTES)
    header, *_ = carry(transport, sender.frames(0, (1,), payload(64)))
    receiver.take(header)
    with pytest.raises(ShipmentCorrupt, match="of 64 bytes"):
        receiver.take(LayerHeader(1, (1,), 8, 0))


def test_bytes_nobody_announced_are_refused(transport):
    receiver = build_transport(transport).receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    with pytest.raises(ShipmentCorrupt):
        receiver.take(Chunk(b"stray"))


def test_inline_chunks_are_about_a_mebibyte():
    frames = list(inline.InlineSender().frames(0, (1,), payload((2 << 20) + 5)))
    assert [len(frame.data) for frame in frames[1:]] == [1 << 20, 1 << 20, 5]


def test_choice_is_the_callers_and_names_both_lists():
    assert choose(("shm", "grpc"), ("inproc", "grpc")) == "grpc"
    with pytest.raises(ShipmentIncompatible, match=r"takes shm.*offers grpc"):
        choose(("shm",), ("grpc",))
    with pytest.raises(ConfigError, match="grpc"):
        build_transport("pigeon")
