"""What is planned once and then runs in every layer whose heads have the same lengths: kernel, lists and choices.

Knows one kernel call. Does not know which layers it serves (`decode.py`) or why they are alike. Legend as in
`attention/base.py`, N = B * K requests of the kernel, J list entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.flashinfer.heads import SparseHeads
from packlight.attention.flashinfer.kernels import DecodeKernel, KernelShape
from packlight.attention.flashinfer.lists import PageLists
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.ops import PLAIN_POOLS, PageOps
from packlight.attention.flashinfer.rating import is_mass
from packlight.attention.flashinfer.reads import HeadReads
from packlight.attention.flashinfer.scores import page_scores
from packlight.kv.pool import PackedPool
from packlight.kv.reading import PageReader, RuledReader


def stored_dtype(pool: PackedPool) -> torch.dtype:
    """Of the pages that kernels read: coded ones are decoded into the pool's dtype first."""
    return pool.k_pages.dtype if isinstance(pool, PLAIN_POOLS) else pool.dtype


class Chooser:
    """Heads whose pages one reader rates."""

    def __init__(self, reader: PageReader, heads: SparseHeads, ops: PageOps) -> None:
        self.heads = heads
        self._reader, self._ops = reader, ops

    def choose(
        self, layer: int, q_NGD: Tensor, scale: float, bounds_NE: Tensor, mirror: TableMirror, indices_J: Tensor
    ) -> None:
        """Write the page lists of these heads."""
        table, heads, reader = mirror.layer(layer), self.heads, self._reader
        if isinstance(reader, RuledReader):
            ratings = self._ops.rate(reader.rule, q_NGD, scale, bounds_NE, table, heads)
            self._ops.pick(ratings, table, heads, indices_J, are_logits=is_mass(reader.rule))
        else:
            scores = page_scores(reader, layer, q_NGD, scale, bounds_NE, table, heads)
            self._ops.pick(scores, table, heads, indices_J, are_logits=False)


class Site:
    """One plan. `load` it for a step, then `attend` in each of its layers. `lists` are those of heads that no chooser
    has; None where each has one."""

    def __init__(
        self, kernel: DecodeKernel, lists: PageLists | None, choosers: Sequence[Chooser], mirror: TableMirror
    ) -> None:
        self._kernel, self._lists, self._choosers, self._mirror = kernel, lists, choosers, mirror
        self._scratch: tuple[Tensor, Tensor] | None = None

    def load(self, batch: DecodeBatch, reads: HeadReads, shape: KernelShape) -> None:
        self._batch, self._shape, rows = batch, shape, list(batch.rows)
        self._indices_J = self._kernel.plan(reads.counts(shape.page_size), shape)
        if self._lists is not None:
            self._lists.load(reads, rows)
        for chooser in self._choosers:
            chooser.heads.load(reads, rows, self._mirror.pages_RLKM.shape)

    def attend(self, layer: int, q_THD: Tensor) -> Tensor:
        """`out_THD` over what is stored by now, the new tokens included."""
        q_NGD = q_THD.reshape(-1, self._shape.group, q_THD.shape[-1])
        if self._lists is not None:
            self._lists.write(layer, self._indices_J)
        for chooser in self._choosers:
            assert self._batch.summaries is not None
            bounds_NE = self._batch.summaries.bounds_NE
            chooser.choose(layer, q_NGD, self._shape.scale, bounds_NE, self._mirror, self._indices_J)
        k_XPD, v_XPD = self._pages()
        return self._kernel.run(q_NGD, k_XPD, v_XPD).view(q_THD.shape)

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
