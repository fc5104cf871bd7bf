"""Domain values survive the wire; foreign bytes get typed errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core import errors
from packlight.core.shipping import Accepted, Chunk, FirstToken, LayerHeader, Manifest, Shipped
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    KVUsage,
    PackSpec,
    PrefillRequest,
    Progress,
    SamplingParams,
    StopRules,
    Timings,
    Token,
    Tokens,
    Usage,
)
from packlight.wire import events, requests
from packlight.wire.frames import event_from_bytes, event_to_bytes, read_varint, varint
from packlight.wire.manifest import decode_manifest, encode_manifest
from packlight.wire.v1 import decode_pb2, prefill_pb2

SAMPLING = SamplingParams(0.5, 0.9, 40, 0.05, 1.1, -0.5, 0.25, ((3, -100.0), (7, 2.5)), 2**64 - 1, 5)
PACK = PackSpec("snapkv", 256, None, 16, 2, 31)
USAGE = Usage(10, 4, 3, KVUsage("snapkv", 12.5, 100, 1000, 0.97), Timings(1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(), SamplingParams(num_logprobs=0, grammar="start: /ø/")])
@pytest.mark.parametrize("pack", [PACK, PackSpec(), PackSpec("snapkv", None, 0.25)])
def test_requests(sampling, pack):
    stop = StopRules(7, (0, 2), (9,), True, 3)
    request = GenerateRequest("r", (1, 2, 2**32 - 1), 2, sampling, stop, pack, "salt", "p", "host:1", 3.5)
    data = requests.generate_to_proto(request).SerializeToString()
    assert requests.generate_from_proto(decode_pb2.GenerateRequest.FromString(data)) == request
    prefill = PrefillRequest("r", (1, 2), 2, sampling, pack, "salt", ("shm", "grpc"), (0,), 3.5)
    data = requests.prefill_to_proto(prefill).SerializeToString()
    assert requests.prefill_from_proto(prefill_pb2.PrefillRequest.FromString(data)) == prefill


def test_a_top_k_that_no_vocabulary_has_keeps_all():
    """Callers may ask for any number; the field has 32 bits."""
    message = requests.sampling_to_proto(SamplingParams(top_k=5_000_000_000))
    assert requests.sampling_from_proto(message).top_k == 2**32 - 1


EVENTS = [
    Accepted("hash", b"\x00\xff"),
    LayerHeader(3, (1, 0, 700), 2**40, 2**64 - 1),
    FirstToken(Token(5, -0.25, ((5, -0.25), (6, -2.0))), 16),
    FirstToken(Token(5), 0),
    Shipped(30, 100, 1000, 12.5, None, 0.1, 0.2, 0.3),
    Shipped(30, 100, 1000, 12.5, 0.5, 0.1, 0.2, 0.3),
]


@pytest.mark.parametrize("event", EVENTS)
def test_prefill_events(event):
    assert event_from_bytes(event_to_bytes(event)) == event


@given(st.binary(max_size=300))
def test_a_chunk_is_what_protobuf_would_have_written(data):
    framed = event_to_bytes(Chunk(data))
    assert framed == prefill_pb2.PrefillEvent(chunk=data).SerializeToString()
    assert bytes(event_from_bytes(framed).data) == data


@given(st.integers(0, 2**63))
def test_varint(value):
    assert read_varint(varint(value), 0) == (value, len(varint(value)))


@pytest.mark.parametrize("data", [b"\x2a", b"\x2a\x80", b"\x2a\x05abc", b"\x2a\x01abc", b"\x0a\xff", b"\xff\xff"])
def test_a_cut_event_is_corrupt(data):
    with pytest.raises(errors.ShipmentCorrupt):
        event_from_bytes(data)


def test_an_event_of_another_release_is_incompatible():
    with pytest.raises(errors.ShipmentIncompatible, match="release"):
        event_from_bytes(b"\xfa\x01\x01x")  # field 31, which this release does not know


@pytest.mark.parametrize(
    "event",
    [
        Tokens("r", (Token(1), Token(2, -1.5, ((2, -1.5),)))),
        Progress("r", USAGE),
        Finished("r", FinishReason.LENGTH, USAGE),
        Finished("r", FinishReason.STOP, Usage(1, 0, 1)),
    ],
)
def test_answer_events(event):
    data = events.event_to_proto(event).SerializeToString()
    assert events.event_from_proto(decode_pb2.Event.FromString(data)) == event


@pytest.mark.parametrize("cls", sorted(errors.error_classes().values(), key=lambda cls: cls.__name__))
def test_every_error_travels_whole(cls):
    error = cls("what", param="kv.budget", code="why", retry_after_s=2.5, worker_id="w")
    data = events.event_to_proto(Failed("r", error)).SerializeToString()
    back = events.event_from_proto(decode_pb2.Event.FromString(data)).error
    assert type(back) is cls
    assert vars(back) == vars(error)


def test_an_unknown_error_is_an_internal_one():
    message = events.error_to_proto(errors.QueueFull("full"))
    message.kind = "FromTheFuture"
    assert type(events.error_from_proto(message)) is errors.InternalError


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (decode_pb2.Event(request_id="r"), "unknown kind"),
        (decode_pb2.Event(request_id="r", finished=decode_pb2.Finished(reason="bored")), "'bored'"),
    ],
)
def test_what_a_later_release_says_ends_the_answer_with_a_word(message, said):
    failed = events.event_from_proto(message)
    assert isinstance(failed, Failed)
    assert (failed.request_id, type(failed.error)) == ("r", errors.InternalError)
    assert said in failed.error.message


def test_manifest():
    manifest = Manifest("r", "grpc", "snapkv", "native", "float32", 16, 30, 3, 64, 2048)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    with pytest.raises(errors.ShipmentCorrupt, match="cannot be parsed"):
        decode_manifest(b"\xff\xff\xff")
