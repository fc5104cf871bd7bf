"""Choosing pages on the device: what `attention/choice.py` does, with lengths that are tensors.

Nothing here waits for the device, and no shape depends on what is in a tensor: so a captured choice can be replayed
with other lengths. Legend: N rows, K KV heads, M pages per head, C pages chosen at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.choice import ORDINAL, ordered_keys


def choose_pages(scores_NKM: Tensor, num_stored_NK: Tensor, num_read_NK: Tensor, width: int) -> Tensor:
    """Page ordinals int64 `[N, K, C]`, ascending, of which the first `num_read` <= `width` = C are meant; the others
    repeat the head's last page. `num_stored` >= `num_read` >= 1; a head that reads 1 reads the last page it has.

    The first page and the last are always among them, then the best of the others, ties to the lower ordinal. Scores
    are finite."""
    top = scores_NKM.shape[-1] - 1
    ordinal_M = torch.arange(top + 1, device=scores_NKM.device)
    last_NK1 = num_stored_NK[..., None] - 1
    is_sure_NKM = (ordinal_M == 0) | (ordinal_M == last_NK1)
    scores_NKM = scores_NKM.masked_fill(is_sure_NKM, torch.inf).masked_fill(ordinal_M > last_NK1, -torch.inf)
    # + 0.0 turns a score of -0.0 into 0.0, which is its equal.
    keys_NKM = ordered_keys(scores_NKM + 0.0) | (top - ordinal_M)
    ordinals_NKC = top - (keys_NKM.topk(width, dim=-1).values & ORDINAL)
    is_unread_NKC = torch.arange(width, device=scores_NKM.device) >= num_read_NK[..., None]
    ordinals_NKC = ordinals_NKC.masked_fill(is_unread_NKC, top).sort(dim=-1).values
    return torch.minimum(ordinals_NKC, last_NK1)
