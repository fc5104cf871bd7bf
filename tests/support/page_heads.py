"""Ragged heads whose pages are to be chosen, over memory full of poison: what kernels that do so are tried on, by
whoever runs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packlight.attention.flashinfer.heads import LayerTable, SparseHeads
from packlight.attention.flashinfer.reads import head_reads

LAYER, NUM_LAYERS, NUM_KV_HEADS, NUM_BATCH_ROWS = 1, 3, 2, 5
POISON = -7


@dataclass(frozen=True, eq=False)
class HeadCase:
    """Some of the rows of a batch are chosen for. Page lists of all rows take `num_entries`."""

    q_XGD: Tensor
    bounds_NE: Tensor
    table: LayerTable
    heads: SparseHeads
    num_entries: int
    seed: int

    def on(self, device: str) -> HeadCase:
        """The same memory elsewhere."""
        heads = SparseHeads(
            self.heads.places, NUM_KV_HEADS, self.heads.page_size, torch.device(device),
            max_stored=self.heads.max_stored, max_read=self.heads.max_read,
        )  # fmt: skip
        heads.fields_FY.copy_(self.heads.fields_FY)
        heads.rows = self.heads.rows
        table = LayerTable(self.table.ids.to(device), self.table.before)
        moved = (self.q_XGD.to(device), self.bounds_NE.to(device), table, heads)
        return HeadCase(*moved, self.num_entries, self.seed)

    @property
    def is_page_YM(self) -> Tensor:
        return self.heads.num_tokens_YM > 0

    def poisoned_indices(self) -> Tensor:
        return torch.full((self.num_entries,), POISON, dtype=torch.int32, device=self.table.ids.device)

    def random_ratings(self, num_rows: int, *, few: bool) -> Tensor:
        """`[Y, R, M]`; where there are `few` of them most are equal, and zeros have either sign."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.is_page_YM.shape[0], num_rows, self.heads.max_stored)
        some = torch.tensor([-3e38, -0.0, 0.0, -0.0, 0.0, 2.0, 3e38])
        drawn = some[torch.randint(len(some), shape, generator=generator)]
        ratings = drawn if few else 3 * torch.randn(shape, generator=generator)
        return ratings.masked_fill(~self.is_page_YM.cpu()[:, None], torch.nan).to(self.table.ids.device)


def head_case(
    dtype: torch.dtype, head_dim: int, group: int, max_pages: int, *, page_size: int, budget: int, seed: int = 0
) -> HeadCase:
    """Pages that no head has are poison: other pages' ids in the table, NaN in their summaries."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    lengths_BK = rng.integers(1, max_pages * page_size + 1, (NUM_BATCH_ROWS, NUM_KV_HEADS)).astype(np.int32)
    lengths_BK[1, 0], lengths_BK[3, 0] = max_pages * page_size, (max_pages - 1) * page_size + 1
    reads = head_reads(lengths_BK, page_size, np.full(NUM_BATCH_ROWS, budget, dtype=np.int32), None)
    num_pages, rows, num_columns = 3 * max_pages + 50, [4, 0, 6, 2, 5], max_pages + 3
    bounds_NE = torch.full((2 * num_pages, 2 * head_dim), torch.nan, dtype=dtype)
    low, high = torch.randn(2, num_pages, head_dim, generator=generator).sort(dim=0).values
    bounds_NE[:num_pages] = torch.cat([low, high], dim=-1).to(dtype)
    shape = (8, NUM_LAYERS, NUM_KV_HEADS, num_columns)
    pages_RLKM = torch.randint(num_pages, 2 * num_pages, shape, generator=generator, dtype=torch.int32)
    for row, num_pages_K in zip(rows, reads.num_stored_BK.tolist(), strict=True):
        for head, count in enumerate(num_pages_K):
            pages_RLKM[row, LAYER, head, :count] = torch.randperm(num_pages, generator=generator)[:count]
    places = [1, 3, 4]
    heads = SparseHeads(
        places, NUM_KV_HEADS, page_size, torch.device("cpu"),
        max_stored=max_pages, max_read=int(reads.num_read_BK[places].max()),
    )  # fmt: skip
    heads.load(reads, rows, pages_RLKM.shape)
    q_XGD = torch.randn(NUM_BATCH_ROWS * NUM_KV_HEADS, group, head_dim, generator=generator).to(dtype)
    table = LayerTable(pages_RLKM.view(-1), LAYER * pages_RLKM.stride(1))
    return HeadCase(q_XGD, bounds_NE, table, heads, int(reads.num_read_BK.sum()), seed)
