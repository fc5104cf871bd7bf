"""SnapKV (arXiv 2404.14469, section 4) for grouped queries, and RocketKV's first stage (arXiv 2502.14051, section 3.3).

Both add up the attention that the window's queries pay to each earlier token. They differ in where pooling stands:
SnapKV pools each query head by itself (the group is added afterwards), RocketKV adds the group first. For average
pooling that is the same.
"""

from __future__ import annotations

from tests.oracles.plain import Vector, add_up, groups, pooled


def scores(
    weights_HWS: list[list[Vector]], num_kv_heads: int, *, kernel: int, pooling: str, pool_first: bool = False
) -> list[Vector]:
    """[K][N], N = S - W: sums over the window's rows and the group's heads, pooled."""
    window, num_tokens = len(weights_HWS[0]), len(weights_HWS[0][0])
    per_head = [add_up(rows)[: num_tokens - window] for rows in weights_HWS]
    if pool_first:
        per_head = [pooled(mass_N, kernel, pooling) for mass_N in per_head]
    per_kv_head = [add_up(group) for group in groups(per_head, num_kv_heads)]
    return per_kv_head if pool_first else [pooled(mass_N, kernel, pooling) for mass_N in per_kv_head]
