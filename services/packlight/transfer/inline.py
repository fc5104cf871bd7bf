"""Transport inside the RPC stream itself: payloads cut into chunks of about 1 MiB. Always works.

Measured on loopback, chunks of 1 MiB cost the least CPU per byte in gRPC; larger and smaller ones cost more. The
receiver copies each chunk once, into one buffer per shipment, as large as its largest layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt
from packlight.core.shipping import Chunk, LayerHeader, ShipFrame
from packlight.transfer.base import (
    CPU,
    KVReceiver,
    KVSender,
    LayerOrder,
    ReceivedLayer,
    Site,
    as_bytes,
    checksum,
)

CHUNK_BYTES = 1 << 20


class InlineTransport:
    def __init__(self, site: Site | None = None) -> None:
        """It is the same everywhere."""

    def sender(self, offer: str) -> KVSender:
        return InlineSender()

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        return InlineReceiver(LayerOrder(num_layers=num_layers, max_layer_bytes=max_layer_bytes))

    def close(self) -> None:
        """It holds nothing."""


class InlineSender:
    device = CPU

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame]:
        data = as_bytes(payload)
        yield LayerHeader(layer, lengths, len(data), checksum(data))
        for start in range(0, len(data), CHUNK_BYTES):
            yield Chunk(data[start : start + CHUNK_BYTES])

    def release(self) -> None:
        pass


class InlineReceiver:
    offer = ""

    def __init__(self, order: LayerOrder) -> None:
        self._order = order
        self._header: LayerHeader | None = None
        self._filled = 0
        self._allocate(0)

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        if isinstance(frame, LayerHeader):
            self._begin(frame)
        else:
            self._append(frame.data)
        return self._complete()

    def release(self, *, unused: bool = False) -> None:
        self._header = None
        self._allocate(0)

    def between_layers(self) -> None:
        """Raises ShipmentCorrupt if bytes of a layer are still due."""
        if self._header is not None:
            raise ShipmentCorrupt(
                f"layer {self._header.layer} ended after {self._filled} of {self._header.num_bytes} bytes"
            )

    def _begin(self, header: LayerHeader) -> None:
        self.between_layers()
        self._order.expect(header)
        if len(self._view) < header.num_bytes:
            self._allocate(header.num_bytes)
        self._header, self._filled = header, 0

    def _allocate(self, num_bytes: int) -> None:
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._view = as_bytes(self._buffer)

    def _append(self, data: memoryview | bytes) -> None:
        due = self._header.num_bytes - self._filled if self._header else 0
        if len(data) > due:
            raise ShipmentCorrupt(f"{len(data)} bytes arrived where at most {due} were due")
        self._view[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def _complete(self) -> ReceivedLayer | None:
        header = self._header
        if header is None or self._filled < header.num_bytes:
            return None
        self._header = None
        self._order.verify(header, self._view[: header.num_bytes])
        return ReceivedLayer(header.layer, header.lengths, self._buffer[: header.num_bytes])
