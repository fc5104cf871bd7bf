"""Ada-KV (arXiv 2407.11550, section 3): heads of a layer compete for its budget, with a share that each is sure of.

Twice: the authors' grouped-query program, which turns wins into capacities, and kvpress, which protects each head's
best and then takes the best of all.
"""

from __future__ import annotations

from fractions import Fraction

from tests.oracles.plain import Vector, best


def wins(scores_KN: list[Vector], base: int) -> list[int]:
    """How many of the layer's K * base best scores each head has. Of equals the lower head, then the lower token."""
    num_tokens = len(scores_KN[0])
    everything = [score for scores_N in scores_KN for score in scores_N]
    counts = [0] * len(scores_KN)
    for place in best(everything, len(scores_KN) * base):
        counts[place // num_tokens] += 1
    return counts


def official(scores_KN: list[Vector], base: int, alpha: float) -> list[int]:
    """Prefix tokens of each head for a mean of `base`. Rounding is to the nearest, half to even, so the sum may miss
    K * base by up to K / 2, or by K where int() cuts as well."""
    if base > len(scores_KN[0]):
        return [len(scores_KN[0])] * len(scores_KN)
    return [round(count * (1 - alpha) + int(base * alpha)) for count in wins(scores_KN, base)]


def conserving(scores_KN: list[Vector], base: int, alpha: float) -> list[int]:
    """Packlight's rounding of the same blend: K * base in all, always. The sure share is int(alpha * base) and the rest
    of the layer goes by wins; whole tokens first, then one each to the largest fractions, of equals the lower head."""
    sure, counts = int(alpha * base), wins(scores_KN, base)
    exact = [Fraction(count * (base - sure), base) for count in counts]
    lengths = [sure + int(part) for part in exact]
    by_fraction = sorted(range(len(exact)), key=lambda head: (int(exact[head]) - exact[head], head))
    for head in by_fraction[: len(counts) * base - sum(lengths)]:
        lengths[head] += 1
    return lengths


def kvpress(scores_KS: list[Vector], budget: int, alpha: float) -> list[list[int]]:
    """Kept tokens of each head: its own best alpha * budget, then the layer's best, K * budget in all."""
    num_tokens = len(scores_KS[0])
    safe = [set(best(scores_S, max(1, int(budget * alpha)))) for scores_S in scores_KS]
    everything = [
        float("inf") if token in safe[head] else score
        for head, scores_S in enumerate(scores_KS)
        for token, score in enumerate(scores_S)
    ]
    chosen = best(everything, len(scores_KS) * budget)
    return [[place % num_tokens for place in chosen if place // num_tokens == head] for head in range(len(scores_KS))]
