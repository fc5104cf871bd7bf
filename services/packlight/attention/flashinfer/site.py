"""What is planned once and then runs in every layer whose heads have the same lengths: kernel, lists and choices.

Knows one kernel call. Does not know which layers it serves (`decode.py`) or why they are alike. Legend as in
`attention/base.py`, N = B * K requests of the kernel, n rows that share a reader, J list entries, C pages chosen,
E = 2 * D.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.flashinfer.choice import PageBars, choose_pages, page_bars
from packlight.attention.flashinfer.kernels import DecodeKernel, KernelShape
from packlight.attention.flashinfer.lists import PageLists
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.reads import HeadReads
from packlight.attention.flashinfer.scores import page_fills, page_scores
from packlight.attention.upload import upload
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool, PackedPool
from packlight.kv.reading import PageReader

# Pools whose pages are numbers, read where they lie.
PLAIN_POOLS = (KVPool, FP8Pool)


def stored_dtype(pool: PackedPool) -> torch.dtype:
    """Of the pages that kernels read: coded ones are decoded into the pool's dtype first."""
    return pool.k_pages.dtype if isinstance(pool, PLAIN_POOLS) else pool.dtype


class Chooser:
    """Rows of a batch whose pages one reader rates. `places` are theirs in the batch."""

    def __init__(
        self, reader: PageReader, places: Sequence[int], num_kv_heads: int, *, max_stored: int, max_chosen: int
    ) -> None:
        self.reader, self._max_stored, self._max_chosen = reader, max_stored, max_chosen
        self._places, self._num_kv_heads = list(places), num_kv_heads
        self._inputs: tuple[Tensor, ...] = ()  # stay where they are over all loads

    def load(self, reads: HeadReads, rows: list[int], mirror: TableMirror, page_size: int) -> None:
        """`rows` are those of the whole batch. What depends on lengths alone is worked out here, for all layers."""
        self._rows = [rows[place] for place in self._places]
        some = (reads.lengths_BK, reads.num_stored_BK, reads.num_read_BK)
        lengths_nK = [x_BK[self._places] for x_BK in some]
        row_nK, place_nK = (np.repeat(np.array(x)[:, None], self._num_kv_heads, 1) for x in (self._rows, self._places))
        stacked = np.stack([*lengths_nK, row_nK, place_nK]).astype(np.int64)
        lengths, num_stored, num_read, rows_nK, places_nK = upload(stacked, mirror.pages_RLKM.device)
        fresh = (
            rows_nK[:, 0], places_nK[:, 0], num_stored, page_fills(lengths, page_size, self._max_stored),
            *page_bars(num_stored, num_read, self._max_stored, self._max_chosen),
        )  # fmt: skip
        self._inputs = self._inputs or tuple(torch.empty_like(x) for x in fresh)
        for kept, x in zip(self._inputs, fresh, strict=True):
            kept.copy_(x)

    def choose(
        self, layer: int, q_BKGD: Tensor, scale: float, batch: DecodeBatch, mirror: TableMirror, out_BKC: Tensor
    ) -> None:
        """Write the ordinals of the pages that each head reads."""
        assert self._inputs, "choose before load"
        assert batch.summaries is not None
        row_n, place_n, num_stored_nK, num_tokens_nKM, *bars = self._inputs
        pages_nKM = mirror.pages_RLKM[:, layer, :, : self._max_stored].index_select(0, row_n)
        scores_nKM = page_scores(
            self.reader,
            layer,
            self._rows,
            q_BKGD.index_select(0, place_n),
            scale,
            batch.summaries.bounds_NE,
            pages_nKM,
            num_stored_nK,
            num_tokens_nKM,
        )
        out_BKC.index_copy_(0, place_n, choose_pages(scores_nKM, PageBars(*bars)))


class Site:
    """One plan. `load` it for a step, then `attend` in each of its layers."""

    def __init__(
        self, kernel: DecodeKernel, lists: PageLists, choosers: Sequence[Chooser], mirror: TableMirror
    ) -> None:
        self._kernel, self._lists, self._choosers, self._mirror = kernel, lists, choosers, mirror
        self._scratch: tuple[Tensor, Tensor] | None = None

    def load(self, batch: DecodeBatch, reads: HeadReads, shape: KernelShape) -> None:
        self._batch, self._shape, rows = batch, shape, list(batch.rows)
        self._indices_J = self._kernel.plan(reads.counts(shape.page_size), shape)
        self._lists.load(reads, rows)
        for chooser in self._choosers:
            chooser.load(reads, rows, self._mirror, shape.page_size)

    def attend(self, layer: int, q_THD: Tensor) -> Tensor:
        """`out_THD` over what is stored by now, the new tokens included."""
        num_kv_heads, head_dim = self._batch.pool.num_kv_heads, q_THD.shape[-1]
        q_BKGD = q_THD.reshape(len(q_THD), num_kv_heads, -1, head_dim)
        for chooser in self._choosers:
            chooser.choose(layer, q_BKGD, self._shape.scale, self._batch, self._mirror, self._lists.chosen_BKC)
        self._lists.write(layer, self._indices_J)
        k_XPD, v_XPD = self._pages()
        return self._kernel.run(q_BKGD.flatten(0, 1), k_XPD, v_XPD).view(q_THD.shape)

    def _pages(self) -> tuple[Tensor, Tensor]:
        """The memory that the lists point into: the pool's, or of a coded pool a copy of what is listed."""
        pool = self._batch.pool
        if isinstance(pool, PLAIN_POOLS):
            return pool.k_pages, pool.v_pages
        pages_J = self._indices_J.long()
        if self._scratch is None:
            shape = (len(pages_J), pool.page_size, pool.head_dim)
            self._scratch = pages_J.new_empty(shape, dtype=pool.dtype), pages_J.new_empty(shape, dtype=pool.dtype)
        pool.gather(pages_J, *self._scratch)
        torch.arange(len(pages_J), out=self._indices_J)
        return self._scratch
