"""What has arrived beside the stream and waits for its header, by shipment.

Knows shipments and sizes. Does not know how bytes come, nor what they mean. Shared by the threads of links and the
event loop, so all of it is under one lock.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class _Awaited:
    """A shipment: the layers that arrived and were not taken, by number."""

    num_layers_left: int
    max_layer_bytes: int
    arrived: dict[int, Tensor] = field(default_factory=dict)


class Landings:
    def __init__(self, device: torch.device) -> None:
        """`device` is where layers are received."""
        self.device = device
        self._lock = threading.Lock()
        self._awaited: dict[int, _Awaited] = {}

    def open(self, num_layers: int, max_layer_bytes: int) -> int:
        """The number of a new shipment, which nobody can guess."""
        shipment = secrets.randbits(62)
        with self._lock:
            self._awaited[shipment] = _Awaited(num_layers, max_layer_bytes)
        return shipment

    def land(self, shipment: int, number: int, payload: Tensor) -> bool:
        """Keep a layer that has arrived. False if nobody waits for it: it was cancelled, or is none of ours."""
        with self._lock:
            awaited = self._awaited.get(shipment)
            if awaited is None or awaited.num_layers_left <= 0 or payload.numel() > awaited.max_layer_bytes:
                return False
            awaited.num_layers_left -= 1
            awaited.arrived[number] = payload
            return True

    def take(self, shipment: int, number: int) -> Tensor | None:
        with self._lock:
            awaited = self._awaited.get(shipment)
            return awaited.arrived.pop(number, None) if awaited else None

    def close(self, shipment: int) -> None:
        with self._lock:
            self._awaited.pop(shipment, None)

    @property
    def num_open(self) -> int:
        with self._lock:
            return len(self._awaited)
