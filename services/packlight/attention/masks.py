"""Which stored tokens a row may see. Legend as in `attention/base.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import PrefillChunk


def causal_mask(chunk: PrefillChunk, sliding_window: int | None, device: torch.device) -> Tensor:
    """`[T, S]`, True where a row may see a stored token."""
    row = torch.arange(chunk.num_context, chunk.num_stored, device=device)[:, None]
    column = torch.arange(chunk.num_stored, device=device)[None, :]
    seen = column <= row
    return seen & (row - column < sliding_window) if sliding_window else seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, -inf elsewhere: what attention adds to its scores. Made once per step; torch would otherwise make
    it from booleans in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
