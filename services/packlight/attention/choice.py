"""Which pages a sparse step reads, given their scores: one rule for every reader.

Shapes: N rows, K KV heads, M pages per head, C pages read per head.

A head reads page 0 (the attention sinks) and its last page (the newest tokens), then the best of the others; ties go to
the lower ordinal. Of those read the last page comes last. It is the only one that may be partly filled, so the tokens
read are the first so many slots of the chosen pages, and masks depend on lengths alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.kv.table import Int32s

_ORDINAL_BITS = 32
ORDINAL = 2**_ORDINAL_BITS - 1


class PageChoice:
    """The choices of heads that have `num_pages_NK` >= 1 pages and read `num_read_NK` of them.

    Made once for all layers whose heads have these lengths: what does not depend on scores is worked out here."""

    def __init__(self, num_pages_NK: Int32s, num_read_NK: Int32s, device: torch.device) -> None:
        ordinal_M = np.arange(num_pages_NK.max())
        last_NK1 = num_pages_NK[..., None] - 1
        is_sure_NKM = (ordinal_M == 0) | (ordinal_M == last_NK1)
        bias_NKM = np.where(is_sure_NKM, np.inf, np.where(ordinal_M > last_NK1, -np.inf, 0.0)).astype(np.float32)
        self._bias_NKM = torch.from_numpy(bias_NKM).to(device)
        self._top = len(ordinal_M) - 1
        self._places_M = torch.from_numpy(self._top - ordinal_M).to(device)
        self._width = int(num_read_NK.max())
        self._is_even = bool((num_read_NK == self._width).all())
        self._is_unread_NKC = torch.from_numpy(np.arange(self._width) >= num_read_NK[..., None]).to(device)
        self._last_NK1 = torch.from_numpy(last_NK1.astype(np.int64)).to(device)

    def best(self, scores_NKM: Tensor) -> Tensor:
        """Page ordinals int64 `[N, K, C]`, ascending; heads that read fewer than C repeat their last page. Scores are
        finite."""
        keys_NKM = ordered_keys(scores_NKM + self._bias_NKM) | self._places_M
        ordinals_NKC: Tensor = self._top - (_largest(keys_NKM, self._width) & ORDINAL)
        if self._is_even:
            return ordinals_NKC.sort(dim=-1).values
        ordinals_NKC = ordinals_NKC.masked_fill_(self._is_unread_NKC, self._top).sort(dim=-1).values
        return torch.minimum(ordinals_NKC, self._last_NK1)


def ordered_keys(scores_NKM: Tensor) -> Tensor:
    """int64 that order as the scores do. The lower half is left free for what decides among equal scores, of which no
    library promises an order. A score of 0 must not be the negative one.

    The bits of positive floats order as the floats do; those of negative ones the other way round."""
    bits = scores_NKM.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << _ORDINAL_BITS


def _largest(keys_NKM: Tensor, width: int) -> Tensor:
    """`[N, K, width]`, descending."""
    if keys_NKM.device.type != "cpu":
        return keys_NKM.topk(width, dim=-1).values
    # Measured on CPU: this takes a third of the time of torch.topk.
    keys = keys_NKM.numpy()
    best = np.partition(keys, keys.shape[-1] - width, axis=-1)[..., keys.shape[-1] - width :]
    return torch.from_numpy(np.flip(np.sort(best, axis=-1), axis=-1).copy())
