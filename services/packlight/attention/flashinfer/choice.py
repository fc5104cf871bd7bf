"""Choosing pages on the device: what `attention/choice.py` does, with lengths that are tensors.

Nothing here waits for the device, and no shape depends on what is in a tensor: so a captured choice can be replayed
with other lengths. Legend: Y heads, M pages per head, C pages chosen at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.choice import ORDINAL, ordered_keys


def choose_pages(scores_YM: Tensor, num_stored_Y: Tensor, num_read_Y: Tensor, width: int) -> Tensor:
    """Page ordinals int64 `[Y, C]`, ascending, of which those that are read come first; the others repeat the head's
    last page. The first page and the last, then the best, ties to the lower ordinal.

    C = `width` >= `num_read`, and `num_stored` >= `num_read` >= 1; a head that reads 1 has 1. What the scores are where
    there is no page does not matter; elsewhere they are finite."""
    top = scores_YM.shape[-1] - 1
    ordinal_M, last_Y1 = torch.arange(top + 1, device=scores_YM.device), num_stored_Y[:, None] - 1
    is_sure_YM = (ordinal_M == 0) | (ordinal_M == last_Y1)
    scores_YM = scores_YM.masked_fill(is_sure_YM, torch.inf).masked_fill(ordinal_M > last_Y1, -torch.inf)
    # + 0.0 turns a score of -0.0 into 0.0, which is its equal.
    keys_YM = ordered_keys(scores_YM + 0.0) | (top - ordinal_M)
    ordinals_YC = top - (keys_YM.topk(width, dim=-1).values & ORDINAL)
    is_unread_YC = torch.arange(width, device=ordinal_M.device) >= num_read_Y[:, None]
    ordinals_YC = ordinals_YC.masked_fill(is_unread_YC, top).sort(dim=-1).values
    return torch.minimum(ordinals_YC, last_Y1)
