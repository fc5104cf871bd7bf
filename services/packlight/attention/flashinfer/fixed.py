"""A decode step whose memory stays where it is, to be captured in a CUDA graph and replayed.

Knows the split: `load` is host work and copies into buffers, before a replay; `attend` is device work on those buffers,
captured. Nothing in `attend` may depend on a number that differs between steps other than through a buffer. Legend as
in `attention/base.py`, N = B * K requests of a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from packlight.attention.base import DecodeBatch, FixedShape
from packlight.attention.flashinfer.decode import kernel_shape
from packlight.attention.flashinfer.heads import SparseHeads
from packlight.attention.flashinfer.kernels import Kernels, KernelShape
from packlight.attention.flashinfer.lists import PageLists
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.ops import PageOps
from packlight.attention.flashinfer.reads import HeadReads, head_reads, page_budgets
from packlight.attention.flashinfer.site import Chooser, Site
from packlight.attention.flashinfer.store import TokenStore


class LayerKind(NamedTuple):
    """Layers that attend alike, and so have the same lengths in every step that is loaded; or, where that was not
    promised, the one `layer`."""

    sliding_window: int | None
    scale: float
    is_sparse: bool
    layer: int | None


class _Planned(NamedTuple):
    """A site, the first of its layers, which stands for all, and what its kernel is scheduled for."""

    site: Site
    layer: int
    shape: KernelShape


class FixedDecode:
    """See `FixedPlan`. The mirror must stay where it is from now on."""

    def __init__(
        self, batch: DecodeBatch, shape: FixedShape, mirror: TableMirror, kernels: Kernels, ops: PageOps
    ) -> None:
        self._shape, self._mirror, self._kernels, self._pool, self._ops = shape, mirror, kernels, batch.pool, ops
        assert shape.num_pages <= mirror.num_columns, "room was not reserved"
        self._pages_RLKM = mirror.pages_RLKM
        pool = batch.pool
        self._store = TokenStore(shape.num_rows, pool.num_layers, pool.num_kv_heads, pool.device, ops)
        self._sites: dict[LayerKind, _Planned] = {}

    def load(self, batch: DecodeBatch) -> None:
        assert len(batch.rows) == self._shape.num_rows, (batch.rows, self._shape)
        assert batch.pool is self._pool, "a fixed plan is for one pool"
        rows = list(batch.rows)
        self._mirror.follow(batch.table, rows)
        assert self._mirror.pages_RLKM is self._pages_RLKM, "the mirror moved: too little was reserved"
        self._batch, self._lengths_BLK = batch, batch.table.new_lengths(rows)
        self._store.load(batch)
        for planned in self._sites.values():
            self._load_site(planned)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._store.store(layer, k_TKD, v_TKD, sliding_window)
        reading = self._shape.reading
        is_sparse = reading is not None and layer >= reading.num_dense_layers and sliding_window is None
        kind = LayerKind(sliding_window, scale, is_sparse, None if self._shape.is_even else layer)
        if kind not in self._sites:
            shape = kernel_shape(self._batch, q_THD, scale, sliding_window)
            self._sites[kind] = _Planned(self._make_site(kind), layer, shape)
            self._load_site(self._sites[kind])
        return self._sites[kind].site.attend(layer, q_THD)

    def _load_site(self, planned: _Planned) -> None:
        planned.site.load(self._batch, self._reads(planned.layer, planned.shape.sliding_window), planned.shape)

    def _reads(self, layer: int, sliding_window: int | None) -> HeadReads:
        budgets_B = page_budgets(self._batch, layer)
        return head_reads(self._lengths_BLK[:, layer], self._pool.page_size, budgets_B, sliding_window)

    def _make_site(self, kind: LayerKind) -> Site:
        pool, num_rows, max_read = self._pool, self._shape.num_rows, self._max_read(kind)
        num_entries = num_rows * pool.num_kv_heads * max_read
        kernel = self._kernels.fixed_decode(num_rows * pool.num_kv_heads, num_entries)
        if not kind.is_sparse:
            return Site(kernel, PageLists(self._mirror, num_entries), (), self._mirror)
        assert self._shape.reading is not None
        # Every row is chosen for, also one that reads all it has: which row that is differs from step to step.
        most = {"max_stored": self._shape.num_pages, "max_read": max_read}
        heads = SparseHeads(range(num_rows), pool.num_kv_heads, pool.page_size, pool.device, **most)
        return Site(kernel, None, [Chooser(self._shape.reading.reader, heads, self._ops)], self._mirror)

    def _max_read(self, kind: LayerKind) -> int:
        """Pages that a head reads at most."""
        if kind.is_sparse:
            assert self._shape.reading is not None
            return min(self._shape.num_pages, self._shape.reading.num_pages)
        if kind.sliding_window is not None:  # it may begin and end in the middle of a page
            return min(self._shape.num_pages, -(-kind.sliding_window // self._pool.page_size) + 1)
        return self._shape.num_pages
