"""How many tokens it takes to retain a share of the attention: the floor of every recipe, and the `mass` budget.

Shapes: K KV heads, S keys, N prefix positions. Knows one scored layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.base import Candidates


def tokens_for_share(candidates: Candidates, share: float) -> list[int]:
    """Per KV head, the fewest tokens, window included, that retain `share` of the window's attention mass when prefix
    tokens are taken in order of their scores, equal scores together. The whole prompt retains any share.

    A pooled peak is a run of equal scores around one token that has all the mass. Stopping in the middle of the run
    would keep what stands before that token and drop what follows it: the rest of the answer."""
    num_prefix, window = candidates.num_prefix, candidates.window
    sorted_KN, order_KN = candidates.scores_KN.sort(dim=1, descending=True, stable=True)
    mass_KS = candidates.mass_KS.double()
    mass_KN = mass_KS[:, :num_prefix].gather(1, order_KN).cumsum(1)
    of_window_K1 = mass_KS[:, num_prefix:].sum(1, keepdim=True)
    wanted_K1 = share * mass_KS.sum(1, keepdim=True) - of_window_K1
    last_K1 = torch.searchsorted(mass_KN, wanted_K1).clamp(max=num_prefix - 1)
    num_K = (candidates.scores_KN >= sorted_KN.gather(1, last_K1)).sum(1)
    num_K = torch.where(wanted_K1.squeeze(1) > 0, num_K, 0)
    return [window + num for num in num_K.tolist()]


def retained_share(candidates: Candidates, prefix: Sequence[Tensor]) -> float:
    """The share of the window's attention mass on the window and on `prefix[k]`, mean over KV heads."""
    rows = zip(candidates.mass_KS, prefix, strict=True)
    return float(_share(candidates, torch.stack([row_S[index].sum(dtype=torch.float64) for row_S, index in rows])))


def pending_share(candidates: Candidates, prefix: Sequence[Tensor] | Tensor) -> Tensor:
    """The same as a number that is still on its way, 0-d fp64; NaN where the layer's attention is not finite."""
    mass_KS = candidates.mass_KS
    if isinstance(prefix, Tensor):
        kept_K = mass_KS.gather(1, prefix).sum(dim=1, dtype=torch.float64)
    else:
        kept_K = torch.stack([row_S[index].sum() for row_S, index in zip(mass_KS.double(), prefix, strict=True)])
    # A sum shows every NaN and infinity of its terms, and infinity less infinity is NaN.
    total = mass_KS.sum()
    return _share(candidates, kept_K) + (total - total)


def _share(candidates: Candidates, kept_K: Tensor) -> Tensor:
    """Of the window and what is kept of the prefix, fp64; 0-d."""
    mass_KS = candidates.mass_KS
    kept_K = kept_K + mass_KS[:, candidates.num_prefix :].sum(dim=1, dtype=torch.float64)
    return (kept_K / mass_KS.sum(dim=1, dtype=torch.float64)).mean().clamp(max=1.0)
