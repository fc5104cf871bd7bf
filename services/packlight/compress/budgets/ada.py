"""Ada-KV (arXiv 2407.11550): the heads of a layer compete for its tokens.

Shapes: K KV heads, N prefix positions.

The error of a layer's output is least, in the paper's bound, if each head keeps those of its tokens that are among the
best of all heads together. A share `alpha` of the mean budget is every head's own, so that none is starved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packlight.compress.budget import Site, base_budget
from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class AdaBudget:
    """Heads keep heads x base budget together, exactly."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        base = base_budget(spec, num_tokens) - spec.window
        num_prefix, others = num_tokens - spec.window, site.num_kv_heads - 1
        # Every head has its sinks among the best, so one head cannot have all.
        most_wins = min(num_prefix, base + others * (base - spec.sinks))
        safe = _safe(spec, base)
        return spec.window + safe + -(-most_wins * (base - safe) // base)

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens) * site.num_kv_heads

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        base = base_budget(spec, candidates.num_tokens) - spec.window
        lengths = blend(_wins(candidates, base), base, _safe(spec, base))
        return [spec.window + length for length in lengths]


def blend(wins: Sequence[int], base: int, safe: int) -> list[int]:
    """`safe` tokens for each head, and the rest of heads x `base` in proportion to `wins`, which sum to heads x `base`.

    Quotas are rounded down. What that leaves goes, one token each, to the largest remainders, ties to the lower
    head, so that the sum is exact (rounding each quota to the nearest, as published, may miss it by half the heads)."""
    quotas = [divmod(num * (base - safe), base) for num in wins]
    num_left = len(wins) * (base - safe) - sum(whole for whole, _ in quotas)
    by_remainder = sorted(range(len(wins)), key=lambda head: (-quotas[head][1], head))
    lucky = frozenset(by_remainder[:num_left])
    return [safe + whole + (head in lucky) for head, (whole, _) in enumerate(quotas)]


def _safe(spec: PackSpec, base: int) -> int:
    return int(param_of(spec, "alpha") * base)


def _wins(candidates: Candidates, base: int) -> list[int]:
    """Of the K * base best tokens of the layer, how many are each head's; ties to the lower head, then index."""
    # Not at the top: bounds are known without torch.
    from packlight.compress.topk import top_indices

    num_heads, num_prefix = candidates.scores_KN.shape
    best = top_indices(candidates.scores_KN.flatten(), num_heads * base)
    wins: list[int] = (best // num_prefix).bincount(minlength=num_heads).tolist()
    return wins
