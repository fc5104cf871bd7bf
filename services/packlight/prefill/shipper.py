"""Selecting, packing and sending the layers of prompts whose last chunk is being computed.

Knows one step: which rows of the flat batch are whose window, and where the frames go. Runs on the compute thread, once
per layer, right after the layer's KV is stored: while the next layer computes, the event loop sends this one.

Legend: T tokens of the step, W window rows, S prompt tokens, X token slots of the pool, P head pages, H query heads,
K KV heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from packlight.attention.base import LayerQueries
from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import Codec, LayerView, Selection
from packlight.compress.evict import evicts, with_mass
from packlight.compress.kept_counts import KeptCounts
from packlight.compress.pack import PackedLayer
from packlight.compress.packers import Packer
from packlight.compress.payload import decode_layer, encode_layer
from packlight.compress.select import Selector, read_masses
from packlight.compress.window import StoredWindow
from packlight.core.shipping import Shipped
from packlight.core.types import ModelSpec, PackSpec
from packlight.kv.pool import ExactPool
from packlight.prefill.marks import LayerMark, Marks, PackMark
from packlight.prefill.outbox import Outbox
from packlight.prefill.staging import Frames, Staging
from packlight.prefill.stopwatch import Stopwatch
from packlight.transfer.base import KVSender


@dataclass(slots=True)
class Tally:
    """What became of one shipment, added up over its layers. `masses`: by layer, what was retained, which may still be
    on its way; `retained_mass` is their mean once all are read."""

    num_layers: int = 0
    shipped_bytes: int = 0
    num_kept: int = 0
    num_grown: int = 0
    masses: list[tuple[int, float | Tensor]] = field(default_factory=list)
    retained_mass: float = 0.0
    select_s: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class ShadowLayer:
    """A layer as the decode worker will have it: pages [P, T, D], after the codec."""

    lengths: tuple[int, ...]
    k_pages: Tensor
    v_pages: Tensor


@dataclass(frozen=True, slots=True)
class Watch:
    """A chunk whose queries are all looked at: rows `start : start + num_rows` of the step, tokens `context` on.
    `blocks`: int64 ids on the pool's device."""

    accumulated: AccumulatedMass
    blocks: Tensor
    start: int
    context: int
    num_rows: int


@dataclass(slots=True)
class Shipment:
    """One prompt of the step: rows `start : start + num_rows` of the flat batch are its tokens from `context` on.
    `blocks`: int64 ids on the pool's device."""

    pack: PackSpec
    anchor: int
    num_tokens: int
    blocks: Tensor
    start: int
    context: int
    window: int
    sender: KVSender
    codec: Codec
    outbox: Outbox
    selector: Selector
    stopwatch: Stopwatch
    accumulated: AccumulatedMass | None = None
    shadow: list[ShadowLayer] | None = None
    marks: Marks | None = None
    kept: KeptCounts | None = None
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

    def settle(self) -> None:
        """Every layer is on its way: wait for what was left to be read, once.

        Raises InternalError when a layer's attention was not finite."""
        masses = read_masses(self.tally.masses)
        self.tally.retained_mass = sum(masses) / max(1, len(masses))
        self.tally.select_s = self.stopwatch.read_s()
        if self.marks is not None:
            self.marks.retained_mass = {layer: mass for (layer, _), mass in zip(self.tally.masses, masses, strict=True)}

    def shipped(self, spec: ModelSpec, itemsize: int, *, queue_s: float, prefill_s: float) -> Shipped:
        tally = self.tally
        num_sites = max(1, tally.num_layers * spec.num_kv_heads)
        return Shipped(
            num_layers=tally.num_layers,
            shipped_bytes=tally.shipped_bytes,
            exact_bytes=spec.kv_bytes_per_token(itemsize) * self.num_tokens,
            num_kept_tokens=tally.num_kept / num_sites,
            retained_mass=tally.retained_mass,
            queue_s=queue_s,
            prefill_s=prefill_s,
            select_s=tally.select_s,
            num_grown_tokens=tally.num_grown / num_sites,
            kept_map=self.kept.as_map() if self.kept else None,
        )


class Shipper:
    """The layer hook of one prefill step."""

    def __init__(
        self,
        spec: ModelSpec,
        pool: ExactPool,
        packer: Packer,
        shipments: Sequence[Shipment],
        watches: Sequence[Watch] = (),
        window: StoredWindow | None = None,
        staging: Staging | None = None,
    ) -> None:
        """`packer` is of `pool`. Without `window` the window's attention is torch's work. `staging`: the way to senders
        that want payloads on the host, if the pool is elsewhere."""
        self._spec, self._pool, self._packer, self._window, self._staging = spec, pool, packer, window, staging
        self._shipments, self._watches = shipments, watches

    def __call__(self, layer: int, queries: LayerQueries) -> None:
        for watch in self._watches:
            self._accumulate(watch, layer, queries)
        for shipment in self._shipments:
            with shipment.stopwatch.running():
                self._add(shipment, layer, queries)

    def _accumulate(self, watch: Watch, layer: int, queries: LayerQueries) -> None:
        k_KSD = self._pool.read_keys(layer, watch.blocks, watch.context + watch.num_rows)
        q_RHD = queries.q_THD[watch.start : watch.start + watch.num_rows]
        watch.accumulated.add(layer, q_RHD, k_KSD, queries.scale)

    def _add(self, shipment: Shipment, layer: int, queries: LayerQueries) -> None:
        """Score one layer; send what can be sent by now: it, or nothing yet, or all that waited."""
        started, sliding_window = time.perf_counter(), self._spec.sliding_windows[layer]
        view = self._view(shipment, layer, queries, is_scored=shipment.selector.scores(sliding_window))
        found = shipment.selector.add(view, sliding_window)
        if shipment.marks is not None:
            shipment.marks.selected.append(LayerMark(layer, started, time.perf_counter()))
        for ready, selection in found:
            self._ship(shipment, ready, selection)

    def _view(self, shipment: Shipment, layer: int, queries: LayerQueries, *, is_scored: bool) -> LayerView:
        """What the selection looks at, and no more: keys have D = 0 where nobody does."""
        pool, blocks, rows = self._pool, shipment.blocks, shipment.window_rows()
        q_WHD, lse_WH = queries.q_THD[rows], None if queries.lse_TH is None else queries.lse_TH[rows]
        mass_KS, needs_keys = None, is_scored
        if is_scored and self._window is not None:
            found = self._window.attend(layer, q_WHD, blocks, shipment.anchor, queries.scale, lse_WH)
            mass_KS, lse_WH = found.mass_KS, found.lse_WH
            needs_keys = shipment.selector.looks_at_keys
        return LayerView(
            q_WHD=q_WHD,
            k_KSD=pool.read_keys(layer, blocks, shipment.anchor)
            if needs_keys
            else q_WHD.new_empty((pool.num_kv_heads, shipment.anchor, 0)),
            scale=queries.scale,
            layer=layer,
            num_layers=self._spec.num_layers,
            lse_WH=lse_WH,
            mass_KS=mass_KS,
            accumulated_KS=shipment.accumulated.layer(layer) if shipment.accumulated else None,
        )

    def _ship(self, shipment: Shipment, layer: int, selection: Selection) -> None:
        started = time.perf_counter()
        packed = self._packer.pack(layer, shipment.blocks, selection)
        payload = encode_layer(shipment.codec, packed)
        sent = shipment.sent(layer, payload, selection)
        shipment.outbox.put_threadsafe(self._frames(shipment.sender, layer, packed.lengths, sent))
        if shipment.shadow is not None:
            shipment.shadow.append(self._shadow(shipment.codec, packed, payload))
        if shipment.kept is not None:
            shipment.kept.add(layer, selection)
        tally = shipment.tally
        tally.num_layers += 1
        tally.shipped_bytes += sent.numel()
        tally.num_kept += sum(packed.lengths)
        tally.num_grown += selection.num_grown
        tally.masses.append((layer, selection.retained_mass))
        if shipment.marks is not None:
            num_kept = sum(packed.lengths) / len(packed.lengths)
            shipment.marks.packed.append(PackMark(layer, started, time.perf_counter(), num_kept, sent.numel()))

    def _frames(self, sender: KVSender, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Frames:
        if self._staging is not None and sender.device.type == "cpu":
            return self._staging.frames(sender, layer, lengths, payload)
        return sender.frames(layer, lengths, payload.to(sender.device))

    def _shadow(self, codec: Codec, packed: PackedLayer, payload: Tensor) -> ShadowLayer:
        pool = self._pool
        pages = decode_layer(codec, payload, packed.lengths, pool.page_size, pool.head_dim, pool.dtype)
        return ShadowLayer(packed.lengths, *pages)
