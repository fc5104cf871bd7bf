"""What each KV head of a layer reads in a decode step: decided from lengths alone, before anything runs.

Knows lengths, windows and budgets (array arithmetic, no tensors). Which pages a sparse head reads depends on its query
and is chosen on the device (`choice.py`); *how many* does not, so every layer whose heads have the same lengths shares
a plan. With a uniform budget that is one plan for all layers; where layers differ there is one per length pattern.

Legend: B rows of the batch, K KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packlight.attention.base import DecodeBatch
from packlight.attention.flashinfer.kernels import PageCounts
from packlight.kv.table import Int32s

EVERYTHING = np.iinfo(np.int32).max  # the budget of a row that is read densely


@dataclass(frozen=True, eq=False, slots=True)
class HeadReads:
    """Of one layer. Tokens stored, pages stored, pages read, and the first page that a densely read head reads, int32
    `[B, K]`; `is_sparse_B`: rows whose pages are chosen by score. The last page read is always the last one stored."""

    lengths_BK: Int32s
    num_stored_BK: Int32s
    num_read_BK: Int32s
    first_BK: Int32s
    is_sparse_B: npt.NDArray[np.bool_]

    def counts(self, page_size: int) -> PageCounts:
        """Of the B * K requests of a kernel call."""
        last_fill_BK = (self.lengths_BK - 1) % page_size + 1
        return PageCounts(self.num_read_BK.ravel(), last_fill_BK.ravel())


def head_reads(lengths_BK: Int32s, page_size: int, budgets_B: Int32s, sliding_window: int | None) -> HeadReads:
    """A row is sparse where a head has more pages than the row's budget; then no head reads more than that. With a
    window, pages that lie before it are not listed, and no row is sparse."""
    num_stored_BK = -(-lengths_BK // page_size)
    if sliding_window is not None:
        budgets_B = np.full_like(budgets_B, EVERYTHING)
    is_sparse_B = num_stored_BK.max(axis=1) > budgets_B
    first_BK = np.maximum(0, lengths_BK - sliding_window) // page_size if sliding_window else np.zeros_like(lengths_BK)
    num_read_BK = np.minimum(num_stored_BK - first_BK, budgets_B[:, None])
    return HeadReads(lengths_BK, num_stored_BK, num_read_BK, first_BK, is_sparse_B)


def page_budgets(batch: DecodeBatch, layer: int) -> Int32s:
    """int32 `[B]`: how many pages a head of each row may read in this layer."""
    budgets_B = np.full(len(batch.rows), EVERYTHING, dtype=np.int32)
    for index, reading in enumerate(batch.reads):
        if reading is not None and layer >= reading.num_dense_layers:
            budgets_B[index] = reading.num_pages
    return budgets_B
