"""The bytes of a prefill stream: protobuf for small events, hand-written framing for bulk.

A bulk event is exactly what protobuf would write for `PrefillEvent{chunk: data}` - one key byte, the length as a
varint, the data - so any protobuf implementation can read the stream; but neither end lets the protobuf runtime copy
the payload (measured: 3300-5700 CPU ms per GiB through protobuf bytes, 1900-2050 this way).
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from packlight.core.errors import ShipmentCorrupt
from packlight.core.shipping import Chunk, PrefillEvent
from packlight.wire.events import prefill_event_from_proto, prefill_event_to_proto
from packlight.wire.v1 import prefill_pb2

CHUNK_KEY = (prefill_pb2.PrefillEvent.CHUNK_FIELD_NUMBER << 3) | 2


def event_to_bytes(event: PrefillEvent) -> bytes:
    if isinstance(event, Chunk):
        return b"".join((bytes((CHUNK_KEY,)), varint(len(event.data)), event.data))
    return bytes(prefill_event_to_proto(event).SerializeToString())


def event_from_bytes(data: bytes) -> PrefillEvent:
    """The event in `data`. A chunk is a view of `data`, not a copy. Raises ShipmentCorrupt if the framing is wrong."""
    if data[:1] == bytes((CHUNK_KEY,)):
        size, start = read_varint(data, 1)
        if start + size != len(data):
            raise ShipmentCorrupt(f"a chunk announces {size} bytes, {len(data) - start} follow")
        return Chunk(memoryview(data)[start:])
    try:
        message = prefill_pb2.PrefillEvent.FromString(data)
    except DecodeError as error:
        raise ShipmentCorrupt(f"an event of {len(data)} bytes cannot be parsed: {error}") from None
    return prefill_event_from_proto(message)


def varint(value: int) -> bytes:
    """Little-endian base 128, as in the protobuf encoding specification."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """(value, index after it)."""
    value = 0
    for index in range(start, min(start + 10, len(data))):
        value |= (data[index] & 0x7F) << (7 * (index - start))
        if data[index] < 0x80:
            return value, index + 1
    raise ShipmentCorrupt("a chunk's length is cut off")
