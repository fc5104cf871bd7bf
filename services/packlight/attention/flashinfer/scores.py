"""Asking a reader for its scores on the device. Legend as in `attention/base.py`, n rows that share a reader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.attention.flashinfer.bounds import StoredBounds
from packlight.kv.reading import PageQuery, PageReader


def page_scores(
    reader: PageReader,
    layer: int,
    rows: Sequence[int],
    q_nKGD: Tensor,
    scale: float,
    bounds_NE: Tensor,
    pages_nKM: Tensor,
    num_stored_nK: Tensor,
    num_tokens_nKM: Tensor,
) -> Tensor:
    """fp32 `[n, K, M]`, finite where there is a page. `pages_nKM` may hold any ids behind a head's last page."""
    bounds = StoredBounds(bounds_NE, pages_nKM, num_stored_nK)
    return reader.score(PageQuery(layer, rows, q_nKGD, scale, bounds, num_tokens_nKM))


def page_fills(lengths_nK: Tensor, page_size: int, num_pages: int) -> Tensor:
    """`[n, K, M]`: how many tokens are on each of M = `num_pages` pages, 0 behind the last."""
    start_M = torch.arange(num_pages, device=lengths_nK.device) * page_size
    return (lengths_nK[..., None] - start_M).clamp(0, page_size)
