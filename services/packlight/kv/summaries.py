"""Page summaries: what can be known of a page's keys without reading them.

Knows the element-wise smallest and largest key of each head page. Does not know which pages matter (`kv/reading.py`).

Legend: N head pages of the pool, X some of them, P page size, D head dim, E = 2 * D.

Together the two bound every product: q.k <= sum_j max(q_j * low_j, q_j * high_j) for each key k of the page (Quest,
arXiv 2406.10774). They take 1/P of the pool's memory, and only where a row with a page-sparse reader is stored.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from packlight.kv.pool import zeros_on_first_touch


class SummaryWriter(Protocol):
    """Who summarises pages as they arrive."""

    def build(self, pages_X: Tensor, k_XPD: Tensor, num_tokens_X: Tensor) -> None:
        """See `PageSummaries.build`. The pages themselves are in the pool."""
        ...


class PageSummaries:
    """Summaries by head page id, in the pool's dtype: minima and maxima of stored keys are stored exactly.

    A page's summary means nothing until it was built or begun. Overwriting a token only widens the bounds of its
    page, which stay bounds."""

    def __init__(self, num_head_pages: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> None:
        # One row per page, low beside high: a page's summary is then one read, and its score one product.
        self._bounds_NE = zeros_on_first_touch((num_head_pages, 2 * head_dim), dtype, device)
        self._empty_E = torch.tensor([torch.inf] * head_dim + [-torch.inf] * head_dim, dtype=dtype, device=device)
        self._head_dim = head_dim

    @property
    def bounds_NE(self) -> Tensor:
        """The memory itself, contiguous, for kernels that read and update it: a row per page, low beside high."""
        return self._bounds_NE

    def build(self, pages_X: Tensor, k_XPD: Tensor, num_tokens_X: Tensor) -> None:
        """Summarise whole pages whose first `num_tokens_X` >= 1 slots hold keys; what the rest holds does not matter.

        `pages_X` are unique head page ids, int64."""
        slot_P1 = torch.arange(k_XPD.shape[1], device=k_XPD.device)[:, None]
        is_unused_XP1 = slot_P1 >= num_tokens_X[:, None, None]
        low_XD = k_XPD.masked_fill(is_unused_XP1, torch.inf).amin(dim=1)
        high_XD = k_XPD.masked_fill(is_unused_XP1, -torch.inf).amax(dim=1)
        self._bounds_NE.index_copy_(0, pages_X, torch.cat([low_XD, high_XD], dim=1))

    def begin(self, pages_X: Tensor) -> None:
        """The pages are empty from here on, whatever they held before."""
        self._bounds_NE[pages_X] = self._empty_E

    def add(self, pages_X: Tensor, k_XD: Tensor) -> None:
        """One more key in each of `pages_X` (unique ids), which were built or begun."""
        bounds_XE, dim = self.read(pages_X), self._head_dim
        low_XD, high_XD = torch.minimum(bounds_XE[:, :dim], k_XD), torch.maximum(bounds_XE[:, dim:], k_XD)
        self._bounds_NE.index_copy_(0, pages_X, torch.cat([low_XD, high_XD], dim=1))

    def read(self, pages_X: Tensor, out_XE: Tensor | None = None) -> Tensor:
        """`[X, E]` in the pool's dtype, as is `out_XE`: the smallest key elements, then the largest. Ids may repeat."""
        return torch.index_select(self._bounds_NE, 0, pages_X, out=out_XE)
