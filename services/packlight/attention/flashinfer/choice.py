"""Choosing pages on the device: what `attention/choice.py` does, with lengths that are tensors.

Nothing here waits for the device, and no shape depends on what is in a tensor: so a captured choice can be replayed
with other lengths. Legend: N rows, K KV heads, M pages per head, C pages chosen at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from packlight.attention.choice import ORDINAL, ordered_keys


class PageBars(NamedTuple):
    """What decides a choice beside scores: worked out from lengths, once for all layers that have them.

    `is_sure_NKM`: always read. `is_beyond_NKM`: no page of the head. `rank_M`: the larger, the sooner among equals.
    `is_unread_NKC`: beyond what the head reads. `last_NK1`: the ordinal of its last page."""

    is_sure_NKM: Tensor
    is_beyond_NKM: Tensor
    rank_M: Tensor
    is_unread_NKC: Tensor
    last_NK1: Tensor


def page_bars(num_stored_NK: Tensor, num_read_NK: Tensor, num_pages: int, width: int) -> PageBars:
    """For scores of M = `num_pages`, of which C = `width` are chosen at most. `num_stored` >= `num_read` >= 1; a head
    that reads 1 reads the last page it has, else the first one and the last are among those it reads."""
    ordinal_M = torch.arange(num_pages, device=num_stored_NK.device)
    last_NK1 = num_stored_NK[..., None] - 1
    return PageBars(
        is_sure_NKM=(ordinal_M == 0) | (ordinal_M == last_NK1),
        is_beyond_NKM=ordinal_M > last_NK1,
        rank_M=num_pages - 1 - ordinal_M,
        is_unread_NKC=torch.arange(width, device=ordinal_M.device) >= num_read_NK[..., None],
        last_NK1=last_NK1,
    )


def choose_pages(scores_NKM: Tensor, bars: PageBars) -> Tensor:
    """Page ordinals int64 `[N, K, C]`, ascending, of which those that are read come first; the others repeat the head's
    last page. The best, ties to the lower ordinal. Scores are finite where there is a page."""
    top = scores_NKM.shape[-1] - 1
    scores_NKM = scores_NKM.masked_fill(bars.is_sure_NKM, torch.inf).masked_fill(bars.is_beyond_NKM, -torch.inf)
    # + 0.0 turns a score of -0.0 into 0.0, which is its equal.
    keys_NKM = ordered_keys(scores_NKM + 0.0) | bars.rank_M
    ordinals_NKC = top - (keys_NKM.topk(bars.is_unread_NKC.shape[-1], dim=-1).values & ORDINAL)
    ordinals_NKC = ordinals_NKC.masked_fill(bars.is_unread_NKC, top).sort(dim=-1).values
    return torch.minimum(ordinals_NKC, bars.last_NK1)
