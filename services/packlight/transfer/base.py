"""The transport seam: how the payload of each layer gets from a prefill to a decode worker.

Knows payloads, frames and checksums. Does not know gRPC, pages, models or requests, and awaits nothing: a sender turns
payloads into frames, a receiver turns frames into payloads, and whoever owns the stream carries the frames.

    receiver.offer ──in the request──▶ transport.sender(offer)
    sender.frames(layer, lengths, payload) ──LayerHeader, Chunk*──▶ receiver.take(frame) -> ReceivedLayer | None

The receiver exists before the request that asks for the shipment, so a transport that moves bytes outside the stream
can tell in its offer how it is reached. Such a transport sends a header only when the bytes it announces lie at the
receiver: until then its frames yield a future, and are drawn from again when that is done. `release` is idempotent on
both ends and ends everything, in any state.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import xxhash
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt
from packlight.core.shipping import LayerHeader, ShipFrame

Pending = Future[Any]
"""What frames yield while a layer is still on its way beside the stream."""

CPU = torch.device("cpu")
WILDCARDS = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a worker is, for transports that listen, or that move bytes between devices.

    `host` is what it listens on, and `advertise` what others reach it at, if that differs. `on_link(transport, event)`
    hears of links, see `links.py`; it may be called from any thread."""

    host: str = "127.0.0.1"
    advertise: str | None = None
    device: torch.device = CPU
    staging_bytes: int = 64 << 20
    on_link: Callable[[str, str], None] = lambda transport, event: None

    @property
    def reach(self) -> str:
        """A name or address of this host for others, without a port."""
        host = self.advertise or self.host
        if host.startswith("[") or host.count(":") == 1:
            host = urlsplit(f"//{host}").hostname or ""
        return socket.gethostname() if host in WILDCARDS else host


@dataclass(frozen=True, slots=True)
class ReceivedLayer:
    """One complete, verified layer. `payload` is flat uint8 and belongs to the caller until the next `take`."""

    layer: int
    lengths: tuple[int, ...]
    payload: Tensor


class KVSender(Protocol):
    @property
    def device(self) -> torch.device:
        """Where it wants payloads."""
        ...

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame | Pending]:
        """The frames of one layer, made as they are asked for; `payload` is flat, contiguous uint8 and must not change
        until they are sent. A Pending instead of a frame: ask again when it is done."""
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

    def release(self, *, unused: bool = False) -> None:
        """`unused`: no sender ever knew of it, or it said that it goes another way."""
        ...


class KVTransport(Protocol):
    """One per worker, made from its `Site`. `max_layer_bytes` is what a receiver must be ready for; more is a corrupt
    shipment."""

    def sender(self, offer: str) -> KVSender:
        """The other end of the receiver that made `offer`. Raises ShipmentIncompatible if it cannot be reached from
        here, or if this is no offer."""
        ...

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        """Raises ShipmentIncompatible if this machine cannot receive so."""
        ...

    def close(self) -> None:
        """Ends its threads and links. Nothing is sent or received afterwards."""
        ...


def checksum(data: memoryview | bytes) -> int:
    """XXH3-64 of a payload."""
    return xxhash.xxh3_64_intdigest(data)


def word_sum(payload: Tensor) -> int:
    """A checksum that a GPU computes where the payload lies: the sum of (i + 1) * (word i + 1) over its 32-bit words,
    modulo 2^63, and then its length. One wrong word is always found, as is a word that moved."""
    words_W = torch.nn.functional.pad(payload, (0, -payload.numel() % 4)).view(torch.int32).to(torch.int64)
    places_W = torch.arange(1, words_W.numel() + 1, device=payload.device)
    return (int(((words_W + 1) * places_W).sum()) + payload.numel()) & (1 << 63) - 1


def checksum_where_it_lies(payload: Tensor) -> int:
    """By the kind of memory: XXH3-64, on a GPU `word_sum`."""
    return word_sum(payload) if payload.is_cuda else checksum(as_bytes(payload))


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
    def verify_where_it_lies(header: LayerHeader, payload: Tensor) -> None:
        if checksum_where_it_lies(payload) != header.checksum:
            raise ShipmentCorrupt(f"layer {header.layer}: checksum mismatch over {header.num_bytes} bytes")

    @staticmethod
    def verify(header: LayerHeader, data: memoryview | bytes) -> None:
        if checksum(data) != header.checksum:
            raise ShipmentCorrupt(f"layer {header.layer}: checksum mismatch over {header.num_bytes} bytes")
