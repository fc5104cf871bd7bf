"""The attention seam: what a backend is given, and what it must do with it.

Knows batches over pages. Does not know models, requests, schedulers or how tokens were selected.

Legend: T tokens of the batch, B requests, H query heads, K KV heads, G = H / K, D head dim, S stored tokens,
L layers, M pages per head at most.

A batch is described once per step and `plan`ned once; the plan is then called by every layer:

    plan = backend.plan(batch)                  # host work, lengths only
    model.forward(tokens, positions, plan, ...) # each layer: plan.attend(layer, q, k, v, ...) -> out
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from packlight.kv.pool import KVPool, PackedPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable


@dataclass(frozen=True, eq=False, slots=True)
class LayerQueries:
    """What a layer asked of its keys: `q_THD` after RoPE, and what q.k is multiplied by.

    lse_TH: fp32, the natural log of the sum of exp(scale * q.k) over all stored tokens that a row sees, its sliding
    window's if there is one; None where the backend does not say (torch's attention, and decode steps)."""

    q_THD: Tensor
    scale: float
    lse_TH: Tensor | None = None


LayerHook = Callable[[int, LayerQueries], None]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Some next tokens of one prompt: rows `start : start + num_tokens` of the flat batch.

    `num_context` tokens of the same prompt are stored already; `blocks` `[ceil((context + tokens) / P)]` int64 holds
    both them and the new ones."""

    start: int
    num_tokens: int
    num_context: int
    blocks: Tensor

    @property
    def num_stored(self) -> int:
        """Tokens stored once this chunk is written."""
        return self.num_context + self.num_tokens


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Chunks of several prompts, flat. Each token sees its own prompt up to itself.

    `on_layer(layer, queries)` is called after a layer's K and V are stored and its output is computed: selection and
    shipping of that layer start there, while the next layer computes. With it, a backend whose attention knows its
    log-sum-exp keeps it."""

    pool: KVPool
    chunks: tuple[PrefillChunk, ...]
    on_layer: LayerHook | None = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One new token for each of `rows` of the head-page table; each head has room for it already (`table.grow`).

    The new token is stored at index `table.new_index` of its head and sees all stored tokens, itself among them; in a
    row with a reading, those of the pages that are read. `reads` has one entry per row, or none for reading everything
    everywhere. `summaries` are needed where there is a reading: those of all pages of such a row, in the layers that it
    reads sparsely, kept up to date here as tokens are stored. Such a row does not overwrite. `on_layer` is called as in
    `PrefillBatch`."""

    pool: PackedPool
    table: HeadPageTable
    rows: tuple[int, ...]
    reads: tuple[Reading | None, ...] = ()
    summaries: PageSummaries | None = None
    on_layer: LayerHook | None = None

    def __post_init__(self) -> None:
        assert not self.reads or len(self.reads) == len(self.rows), (self.reads, self.rows)
        sparse_rows = [row for row, reading in zip(self.rows, self.reads, strict=False) if reading is not None]
        assert self.summaries is not None or not sparse_rows, f"rows {sparse_rows} read by summaries, there are none"
        assert (self.table.overwrite[sparse_rows] < 0).all(), "a row that reads some pages only does not overwrite"


class AttentionPlan(Protocol):
    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Store k and v, attend, return `out_THD`. Query head h reads KV head h // G. With a sliding window of w, a
        token sees itself and the w - 1 before it; in packed KV these are the last w stored ones, because packing
        keeps an unbroken tail in such layers."""
        ...


class AttentionBackend(Protocol):
    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        """Prepare one step. The plan is valid until the batch's tables change."""
        ...


@dataclass(frozen=True, slots=True)
class FixedShape:
    """Decode steps that one fixed plan can be loaded with: exactly `num_rows` rows, no more than `num_pages` pages in
    any head. With a `reading` every row has one of the same rule that reads no more pages and has as many dense layers.
    If it `is_even`, layers that attend alike hold the same lengths; otherwise each layer is planned alone, which takes
    the host that much longer."""

    num_rows: int
    num_pages: int
    reading: Reading | None = None
    is_even: bool = True


class FixedPlan(AttentionPlan, Protocol):
    """A plan for many steps, all of whose memory stays where it is: what `attend` does on the device can be captured
    once and replayed after every `load`. It learns in its first step which layers attend alike."""

    def load(self, batch: DecodeBatch) -> None:
        """Make it the plan of this step. Pool, table and summaries are those it was made with. `on_layer` is not
        called."""
        ...


@runtime_checkable
class FixedBackend(AttentionBackend, Protocol):
    """A backend whose steps can be captured."""

    def reserve(self, table: HeadPageTable, pool: PackedPool, num_pages: int) -> None:
        """No head of the table will ever hold more pages: what is kept of it may stay where it is from now on."""
        ...

    def fixed_plan(self, batch: DecodeBatch, shape: FixedShape) -> FixedPlan:
        """`batch` is one that the plan could be loaded with. Room was reserved for its table."""
        ...
