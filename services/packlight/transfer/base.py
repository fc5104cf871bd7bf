"""The transport seam: how the payload of each layer gets from a prefill to a decode worker.

Knows payloads, frames and checksums. Does not know gRPC, pages, models or requests, and awaits nothing: a sender turns
payloads into frames, a receiver turns frames into payloads, and whoever owns the stream carries the frames.

    receiver.offer ──in the request──▶ transport.sender(offer)
    sender.frames(layer, lengths, payload) ──LayerHeader, Chunk*──▶ receiver.take(frame) -> ReceivedLayer | None

The receiver exists before the request that asks for the shipment, so a transport that moves bytes outside the stream
can tell in its offer how it is reached. `release` is idempotent on both ends and ends everything, in any state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import xxhash
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt
from packlight.core.shipping import LayerHeader, ShipFrame


@dataclass(frozen=True, slots=True)
class ReceivedLayer:
    """One complete, verified layer. `payload` is flat uint8 and belongs to the caller until the next `take`."""

    layer: int
    lengths: tuple[int, ...]
    payload: Tensor


class KVSender(Protocol):
    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame]:
        """The frames of one layer, made as they are asked for; `payload` is flat, contiguous uint8 and must not change
        until they are sent."""
        ...

    def release(self) -> None: ...


class KVReceiver(Protocol):
    @property
    def offer(self) -> str:
        """What its sender needs to know, opaque to everyone else. Empty where the stream itself is enough."""
        ...

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        """The layer that `frame` completes. Raises ShipmentCorrupt on a wrong checksum, length or order."""
        ...

    def release(self) -> None: ...


class KVTransport(Protocol):
    """One per worker. `max_layer_bytes` is what a receiver must be ready for; more is a corrupt shipment."""

    def sender(self, offer: str) -> KVSender:
        """The other end of the receiver that made `offer`. Raises ShipmentIncompatible if it cannot be reached from
        here, or if this is no offer."""
        ...

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        """Raises ShipmentIncompatible if this machine cannot receive so."""
        ...


def checksum(data: memoryview | bytes) -> int:
    """XXH3-64 of a payload."""
    return xxhash.xxh3_64_intdigest(data)


def as_bytes(payload: Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the CPU, not a copy."""
    return memoryview(payload.numpy())  # type: ignore[arg-type]  # a buffer, though numpy's stubs do not say so


class LayerOrder:
    """What every receiver verifies: each layer once, in order, of a size it can take, with the right checksum."""

    def __init__(self, *, num_layers: int, max_layer_bytes: int) -> None:
        self._num_layers, self._max_layer_bytes = num_layers, max_layer_bytes
        self._next_layer = 0

    def expect(self, header: LayerHeader) -> None:
        if header.layer != self._next_layer or header.layer >= self._num_layers:
            raise ShipmentCorrupt(f"layer {header.layer} arrived where layer {self._next_layer} was due")
        if not 0 <= header.num_bytes <= self._max_layer_bytes:
            raise ShipmentCorrupt(
                f"layer {header.layer} announces {header.num_bytes} bytes, at most {self._max_layer_bytes} are possible"
            )
        self._next_layer += 1

    @staticmethod
    def verify(header: LayerHeader, data: memoryview | bytes) -> None:
        if checksum(data) != header.checksum:
            raise ShipmentCorrupt(f"layer {header.layer}: checksum mismatch over {header.num_bytes} bytes")
