"""Selecting, packing and sending the layers of prompts whose last chunk is being computed.

Knows one step: which rows of the flat batch are whose window, and where the frames go. Runs on the compute thread, once
per layer, right after the layer's KV is stored: while the next layer computes, the event loop sends this one.

Legend: T tokens of the step, W window rows, S prompt tokens, P head pages, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import Codec, LayerView, Selection
from packlight.compress.evict import evicts, with_mass
from packlight.compress.pack import PackedLayer, pack
from packlight.compress.payload import decode_layer, encode_layer
from packlight.compress.select import Selector
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
    num_grown: int = 0
    mass: float = 0.0
    select_s: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class ShadowLayer:
    """A layer as the decode worker will have it: pages [P, T, D], after the codec."""

    lengths: tuple[int, ...]
    k_pages: Tensor
    v_pages: Tensor


@dataclass(frozen=True, slots=True)
class Watch:
    """A chunk whose queries are all looked at: rows `start : start + num_rows` of the step, tokens `context` on."""

    accumulated: AccumulatedMass
    blocks: PageIds
    start: int
    context: int
    num_rows: int


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
    selector: Selector
    accumulated: AccumulatedMass | None = None
    shadow: list[ShadowLayer] | None = None
    tally: Tally = field(default_factory=Tally)

    def window_rows(self) -> slice:
        end = self.start + self.anchor - self.context
        return slice(end - min(self.window, self.anchor), end)

    def sent(self, layer: int, payload: Tensor, selection: Selection) -> Tensor:
        """The bytes that travel: the layer's pages, and the mass of their tokens if decode goes on evicting."""
        if not evicts(self.pack):
            return payload
        mass_KS = self.accumulated.layer(layer) if self.accumulated else None
        return with_mass(payload, selection.indices, mass_KS)

    def shipped(self, spec: ModelSpec, itemsize: int, *, queue_s: float, prefill_s: float) -> Shipped:
        tally = self.tally
        num_sites = max(1, tally.num_layers * spec.num_kv_heads)
        return Shipped(
            num_layers=tally.num_layers,
            shipped_bytes=tally.shipped_bytes,
            exact_bytes=spec.kv_bytes_per_token(itemsize) * self.num_tokens,
            num_kept_tokens=tally.num_kept / num_sites,
            retained_mass=tally.mass / max(1, tally.num_layers),
            queue_s=queue_s,
            prefill_s=prefill_s,
            select_s=tally.select_s,
            num_grown_tokens=tally.num_grown / num_sites,
        )


class Shipper:
    """The layer hook of one prefill step."""

    def __init__(
        self, spec: ModelSpec, pool: KVPool, shipments: Sequence[Shipment], watches: Sequence[Watch] = ()
    ) -> None:
        self._spec, self._pool, self._shipments, self._watches = spec, pool, shipments, watches

    def __call__(self, layer: int, q_THD: Tensor, scale: float) -> None:
        for watch in self._watches:
            self._accumulate(watch, layer, q_THD, scale)
        for shipment in self._shipments:
            started = time.perf_counter()
            self._add(shipment, layer, q_THD[shipment.window_rows()], scale)
            shipment.tally.select_s += time.perf_counter() - started

    def _accumulate(self, watch: Watch, layer: int, q_THD: Tensor, scale: float) -> None:
        k_KSD = self._pool.read_keys(layer, _ids(watch.blocks, q_THD), watch.context + watch.num_rows)
        watch.accumulated.add(layer, q_THD[watch.start : watch.start + watch.num_rows], k_KSD, scale)

    def _add(self, shipment: Shipment, layer: int, q_WHD: Tensor, scale: float) -> None:
        """Score one layer; send what can be sent by now: it, or nothing yet, or all that waited."""
        blocks = _ids(shipment.blocks, q_WHD)
        kv = self._pool.read_blocks(layer, blocks, shipment.num_tokens)
        view = LayerView(
            q_WHD=q_WHD,
            k_KSD=kv[0][:, : shipment.anchor],
            scale=scale,
            layer=layer,
            num_layers=self._spec.num_layers,
            accumulated_KS=shipment.accumulated.layer(layer) if shipment.accumulated else None,
        )
        for ready, selection in shipment.selector.add(view, self._spec.sliding_windows[layer]):
            shown = kv if ready == layer else self._pool.read_blocks(ready, blocks, shipment.num_tokens)
            self._ship(shipment, ready, selection, *shown)

    def _ship(self, shipment: Shipment, layer: int, selection: Selection, k_KSD: Tensor, v_KSD: Tensor) -> None:
        packed = pack(k_KSD, v_KSD, selection, self._pool.page_size)
        payload = encode_layer(shipment.codec, packed).cpu()
        sent = shipment.sent(layer, payload, selection)
        shipment.outbox.put_threadsafe(shipment.sender.frames(layer, packed.lengths, sent))
        if shipment.shadow is not None:
            shipment.shadow.append(self._shadow(shipment.codec, packed, payload))
        tally = shipment.tally
        tally.num_layers += 1
        tally.shipped_bytes += sent.numel()
        tally.num_kept += sum(packed.lengths)
        tally.num_grown += selection.num_grown
        tally.mass += selection.retained_mass

    def _shadow(self, codec: Codec, packed: PackedLayer, payload: Tensor) -> ShadowLayer:
        pool = self._pool
        pages = decode_layer(codec, payload, packed.lengths, pool.page_size, pool.head_dim, pool.dtype)
        return ShadowLayer(packed.lengths, *pages)


def _ids(blocks: PageIds, like: Tensor) -> Tensor:
    return torch.as_tensor(blocks, dtype=torch.int64, device=like.device)
