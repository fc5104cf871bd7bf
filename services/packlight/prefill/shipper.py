"""Selecting, packing and sending the layers of prompts whose last chunk is being computed.

Knows one step: which rows of the flat batch are whose window, and where the frames go. Runs on the compute thread, once
per layer, right after the layer's KV is stored: while the next layer computes, the event loop sends this one.

Legend: T tokens of the step, W window rows, S prompt tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packlight.compress.base import Codec, LayerView
from packlight.compress.pack import pack
from packlight.compress.select import select
from packlight.core.shipping import Shipped
from packlight.core.types import ModelSpec, PackSpec
from packlight.kv.pages import PageIds
from packlight.kv.pool import KVPool
from packlight.prefill.outbox import Outbox
from packlight.transfer.base import KVSender


@dataclass(slots=True)
class Tally:
    """What became of one shipment, added up over its layers."""

    num_layers: int = 0
    shipped_bytes: int = 0
    num_kept: int = 0
    mass: float = 0.0
    select_s: float = 0.0


@dataclass(slots=True)
class Shipment:
    """One prompt of the step: rows `start : start + num_rows` of the flat batch are its tokens from `context` on."""

    pack: PackSpec
    anchor: int
    num_tokens: int
    blocks: PageIds
    start: int
    context: int
    window: int
    sender: KVSender
    codec: Codec
    outbox: Outbox
    tally: Tally = field(default_factory=Tally)

    def window_rows(self) -> slice:
        end = self.start + self.anchor - self.context
        return slice(end - min(self.window, self.anchor), end)

    def shipped(self, spec: ModelSpec, itemsize: int, *, queue_s: float, prefill_s: float) -> Shipped:
        tally = self.tally
        return Shipped(
            num_layers=tally.num_layers,
            shipped_bytes=tally.shipped_bytes,
            exact_bytes=spec.kv_bytes_per_token(itemsize) * self.num_tokens,
            num_kept_tokens=tally.num_kept / max(1, tally.num_layers * spec.num_kv_heads),
            retained_mass=tally.mass / max(1, tally.num_layers),
            queue_s=queue_s,
            prefill_s=prefill_s,
            select_s=tally.select_s,
        )


class Shipper:
    """The layer hook of one prefill step."""

    def __init__(self, spec: ModelSpec, pool: KVPool, shipments: Sequence[Shipment]) -> None:
        self._spec, self._pool, self._shipments = spec, pool, shipments

    def __call__(self, layer: int, q_THD: Tensor, scale: float) -> None:
        for shipment in self._shipments:
            started = time.perf_counter()
            self._ship(shipment, layer, q_THD[shipment.window_rows()], scale)
            shipment.tally.select_s += time.perf_counter() - started

    def _ship(self, shipment: Shipment, layer: int, q_WHD: Tensor, scale: float) -> None:
        blocks = torch.as_tensor(shipment.blocks, dtype=torch.int64, device=q_WHD.device)
        k_KSD, v_KSD = self._pool.read_blocks(layer, blocks, shipment.num_tokens)
        view = LayerView(q_WHD, k_KSD[:, : shipment.anchor], scale, layer, self._spec.num_layers)
        selection = select(
            view, shipment.pack, num_tokens=shipment.num_tokens, sliding_window=self._spec.sliding_windows[layer]
        )
        packed = pack(k_KSD, v_KSD, selection, self._pool.page_size)
        payload = shipment.codec.encode(packed.k_pages, packed.v_pages).cpu()
        lengths = tuple(selection.lengths())
        shipment.outbox.put_threadsafe(shipment.sender.frames(layer, lengths, payload))
        self._count(shipment.tally, lengths, payload, selection.retained_mass)

    @staticmethod
    def _count(tally: Tally, lengths: tuple[int, ...], payload: Tensor, mass: float) -> None:
        tally.num_layers += 1
        tally.shipped_bytes += payload.numel()
        tally.num_kept += sum(lengths)
        tally.mass += mass
