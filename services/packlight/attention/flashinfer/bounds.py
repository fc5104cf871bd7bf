"""Page summaries multiplied where they lie, for readers that no kernel knows (`PageRule`): they ask for products.

Knows summaries, page ids and products. Does not know what the products mean (`compress/readers/`). On a GPU with Triton
one kernel reads each summary once; everywhere else torch gathers and multiplies, which is the twin that tests compare.

Legend: n rows, K KV heads, G rows of a probe per head, M pages per head, E = 2 * D, N head pages, X = n * K * M.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from packlight.attention.flashinfer.ops import has_triton


class StoredBounds:
    """A `PageBounds` over `pages_nKM` (int32 or int64), of which the first `num_stored_nK` of a head are meant."""

    def __init__(self, bounds_NE: Tensor, pages_nKM: Tensor, num_stored_nK: Tensor) -> None:
        self._bounds_NE, self._pages_nKM, self._num_stored_nK = bounds_NE, pages_nKM, num_stored_nK

    def products(self, probe_BKGE: Tensor) -> Tensor:
        """fp32 `[n, K, G, M]`; something finite where there is no page."""
        compute = compiled_products if has_triton(self._bounds_NE.device) else gathered_products
        return compute(probe_BKGE.float(), self._bounds_NE, self._pages_nKM, self._num_stored_nK)


def gathered_products(probe_nKGE: Tensor, bounds_NE: Tensor, pages_nKM: Tensor, num_stored_nK: Tensor) -> Tensor:
    """The twin. What is listed behind a head's last page may be another's, whose summary may not be finite."""
    ordinal_M = torch.arange(pages_nKM.shape[-1], device=pages_nKM.device)
    pages_nKM = torch.where(ordinal_M < num_stored_nK[..., None], pages_nKM, pages_nKM[..., :1])
    bounds_XE = bounds_NE.index_select(0, pages_nKM.flatten()).float()
    return torch.matmul(probe_nKGE, bounds_XE.view(*pages_nKM.shape, -1).transpose(-1, -2))


def compiled_products(probe_nKGE: Tensor, bounds_NE: Tensor, pages_nKM: Tensor, num_stored_nK: Tensor) -> Tensor:
    kernel = importlib.import_module("packlight.attention.flashinfer.products_kernel")
    products: Tensor = kernel.page_products(
        probe_nKGE.contiguous(), bounds_NE, pages_nKM.contiguous(), num_stored_nK.contiguous()
    )
    return products
