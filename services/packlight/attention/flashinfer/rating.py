"""What page-sparse readers ask of page summaries, by `PageRule`: the same as their `score`, up to rounding, for whoever
computes it without them.

Knows queries and summaries. Does not know where either lies. Legend: Y heads, G query heads per KV head, D head dim,
M pages per head, E = 2 * D, R ratings of a page: one for each query head of the group, or one for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.kv.reading import PageRating, PageRule


def is_mass(rule: PageRule) -> bool:
    """Whether a page's R ratings are logits of G query heads, whose mean share of attention is the score."""
    return rule.rating is PageRating.MASS_OF_REPRESENTATIVES


def ratings(rule: PageRule, q_YGD: Tensor, scale: float, bounds_YME: Tensor) -> Tensor:
    """fp32 `[Y, R, M]`, of fp32 queries and bounds."""
    if is_mass(rule):
        return _representative_logits(q_YGD, scale, bounds_YME, rule.num_dims)
    probe_YE = torch.cat([q_YGD.clamp(max=0).sum(dim=1), q_YGD.clamp(min=0).sum(dim=1)], dim=-1)
    return torch.matmul(probe_YE[:, None], bounds_YME.transpose(-1, -2))


def mass_of(ratings_YRM: Tensor, num_tokens_YM: Tensor) -> Tensor:
    """`[Y, M]`: softmax over tokens, each with the logit of its page, summed by page; mean over the group. Pages
    without tokens weigh nothing, whatever they are rated."""
    logits_YRM = ratings_YRM + num_tokens_YM.clamp(min=1).float().log()[:, None]
    return logits_YRM.masked_fill((num_tokens_YM == 0)[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)


def _representative_logits(q_YGD: Tensor, scale: float, bounds_YME: Tensor, num_dims: int) -> Tensor:
    """One key stands for a page: its largest or smallest elements, by the sign of the group's sum. Only the `num_dims`
    dims count in which the group is largest (ties to the lower), at a temperature for what they leave out."""
    low_YMD, high_YMD = bounds_YME.chunk(2, dim=-1)
    key_YMD = torch.where((q_YGD.sum(dim=1) > 0)[:, None], high_YMD, low_YMD)
    kept_YGD = q_YGD
    if num_dims < q_YGD.shape[-1]:
        order_YD = q_YGD.abs().sum(dim=1).sort(dim=-1, descending=True, stable=True).indices
        is_kept_YD = torch.zeros_like(order_YD, dtype=torch.bool).scatter_(-1, order_YD[:, :num_dims], True)
        kept_YGD = q_YGD * is_kept_YD[:, None]
    share_YG1 = _l1_norm(kept_YGD) / _l1_norm(q_YGD)
    return torch.matmul(kept_YGD * (scale * share_YG1.rsqrt()), key_YMD.transpose(-1, -2))


def _l1_norm(x_YGD: Tensor) -> Tensor:
    """`[Y, G, 1]`; never 0, so that a query of zeros rates all pages alike."""
    return x_YGD.abs().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
