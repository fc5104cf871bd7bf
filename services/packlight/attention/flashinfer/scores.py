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
    lengths_nK: Tensor,
    page_size: int,
) -> Tensor:
    """fp32 `[n, K, M]`, finite where there is a page. `pages_nKM` may hold any ids behind a head's last page."""
    start_M = torch.arange(pages_nKM.shape[-1], device=pages_nKM.device) * page_size
    num_tokens_nKM = (lengths_nK[..., None] - start_M).clamp(0, page_size)
    bounds = StoredBounds(bounds_NE, pages_nKM, -(-lengths_nK // page_size))
    return reader.score(PageQuery(layer, rows, q_nKGD, scale, bounds, num_tokens_nKM))
