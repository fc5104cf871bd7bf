"""A decode step on FlashInfer: the tokens are stored, and each layer attends through the plan of its site.

Knows which layers of a step are alike. Legend as in `attention/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from packlight.attention.base import DecodeBatch, LayerQueries
from packlight.attention.flashinfer.heads import SparseHeads
from packlight.attention.flashinfer.kernels import DecodeKernel, KernelShape
from packlight.attention.flashinfer.lists import PageLists
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.ops import PageOps
from packlight.attention.flashinfer.reads import HeadReads, head_reads, page_budgets
from packlight.attention.flashinfer.site import Chooser, Site, stored_dtype
from packlight.attention.flashinfer.store import TokenStore
from packlight.kv.reading import PageReader

SiteKey = tuple[bytes, bytes, int | None, float]


class FlashInferDecode:
    """Plans a site when the first layer comes that needs it. `kernel(i)` is the i-th kernel of a step."""

    def __init__(
        self, batch: DecodeBatch, mirror: TableMirror, kernel: Callable[[int], DecodeKernel], ops: PageOps
    ) -> None:
        rows, pool = list(batch.rows), batch.pool
        self._batch, self._mirror, self._kernel, self._ops = batch, mirror, kernel, ops
        mirror.follow(batch.table, rows)
        self._lengths_BLK = batch.table.new_lengths(rows)
        self._store = TokenStore(len(rows), pool.num_layers, pool.num_kv_heads, pool.device, ops)
        self._store.load(batch)
        self._sites: dict[SiteKey, Site] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._store.store(layer, k_TKD, v_TKD, sliding_window)
        out_THD = self._site(layer, q_THD, scale, sliding_window).attend(layer, q_THD)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return out_THD

    def _site(self, layer: int, q_THD: Tensor, scale: float, sliding_window: int | None) -> Site:
        budgets_B = page_budgets(self._batch, layer)
        key = (self._lengths_BLK[:, layer].tobytes(), budgets_B.tobytes(), sliding_window, scale)
        if key not in self._sites:
            reads = head_reads(self._lengths_BLK[:, layer], self._batch.pool.page_size, budgets_B, sliding_window)
            self._sites[key] = self._make_site(reads)
            self._sites[key].load(self._batch, reads, kernel_shape(self._batch, q_THD, scale, sliding_window))
        return self._sites[key]

    def _make_site(self, reads: HeadReads) -> Site:
        shares: dict[int, tuple[PageReader, list[int]]] = {}
        for place, reading in enumerate(self._batch.reads):
            if reading is not None and reads.is_sparse_B[place]:
                shares.setdefault(id(reading.reader), (reading.reader, []))[1].append(place)
        choosers = [Chooser(reader, self._heads(places, reads), self._ops) for reader, places in shares.values()]
        lists = None if reads.is_sparse_B.all() else PageLists(self._mirror, int(reads.num_read_BK.sum()))
        return Site(self._kernel(len(self._sites)), lists, choosers, self._mirror)

    def _heads(self, places: list[int], reads: HeadReads) -> SparseHeads:
        pool = self._batch.pool
        most = {"max_stored": int(reads.num_stored_BK[places].max()), "max_read": int(reads.num_read_BK[places].max())}
        return SparseHeads(places, pool.num_kv_heads, pool.page_size, pool.device, **most)


def kernel_shape(batch: DecodeBatch, q_THD: Tensor, scale: float, sliding_window: int | None) -> KernelShape:
    pool = batch.pool
    group = q_THD.shape[1] // pool.num_kv_heads
    kv_dtype = stored_dtype(pool)
    return KernelShape(group, pool.head_dim, pool.page_size, q_THD.dtype, kv_dtype, scale, sliding_window)
