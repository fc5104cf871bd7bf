"""RocketKV's adaptive split (arXiv 2502.14051 v3, section 3.5): how much each of the two stages compresses."""

from __future__ import annotations

from math import ceil, log2, sqrt
from typing import NamedTuple


class Split(NamedTuple):
    """r: the exponent of stage 1's share. cap: tokens after stage 1, room for the answer included. c2: what stage 2 has
    left to do. page: tokens of a summary page. k1: head dimensions looked at. k2: tokens attended to."""

    r: float
    cap: int
    c2: float
    page: int
    k1: int
    k2: int


def split(num_prompt: int, tokens: int, *, num_new: int, head_dim: int) -> Split:
    """In the integers of the accuracy experiments: `tokens` is what one decode step may cost, half of it spent on
    estimating and half on attending. Stage 1 keeps `cap - num_new` prompt tokens."""
    total = num_prompt + num_new
    c = total / tokens
    r = min(0.2 + 0.06 * log2(c), 0.8)
    cap = max(int(total / c**r), min(2 * num_new, total))
    c2 = max(1.0, cap / tokens)
    page = ceil(sqrt(c2))
    if page > c2:
        page = 1
    return Split(r, cap, c2, page, int(head_dim * page / c2), tokens // 2)
