"""Transport between two workers of one process: the payload itself is the frame, nothing is copied.

The receiver still verifies order, size and checksum, so both transports fail alike.
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


class InprocTransport:
    def __init__(self, site: Site | None = None) -> None:
        """It is the same everywhere."""

    def sender(self, offer: str) -> KVSender:
        return InprocSender()

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        return InprocReceiver(num_layers=num_layers, max_layer_bytes=max_layer_bytes)

    def close(self) -> None:
        """It holds nothing."""


class InprocSender:
    device = CPU

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame]:
        data = as_bytes(payload)
        yield LayerHeader(layer, lengths, len(data), checksum(data))
        yield Chunk(data)

    def release(self) -> None:
        pass


class InprocReceiver:
    offer = ""

    def __init__(self, *, num_layers: int, max_layer_bytes: int) -> None:
        self._order = LayerOrder(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
        self._header: LayerHeader | None = None

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        if isinstance(frame, LayerHeader):
            if self._header is not None:
                raise ShipmentCorrupt(f"layer {self._header.layer} ended after 0 of {self._header.num_bytes} bytes")
            self._order.expect(frame)
            self._header = frame
            return None
        header, self._header = self._header, None
        if header is None or len(frame.data) != header.num_bytes:
            raise ShipmentCorrupt(f"{len(frame.data)} bytes arrived where {header.num_bytes if header else 0} were due")
        self._order.verify(header, frame.data)
        payload = torch.frombuffer(frame.data, dtype=torch.uint8) if header.num_bytes else torch.empty(0).byte()
        return ReceivedLayer(header.layer, header.lengths, payload)

    def release(self, *, unused: bool = False) -> None:
        self._header = None
