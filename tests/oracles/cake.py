"""CAKE (ICLR 2025, sections 4.1 to 4.3): layers share one budget by how spread out and how moving their attention is.

The one-shot allocation over all layers; the paper's cascade reaches the same result layer by layer.
"""

from __future__ import annotations

from math import log

from tests.oracles.plain import Vector, add_up, groups, pooled

TINY = 1e-10


def preference(dispersion: float, shift: float, tau1: float, tau2: float) -> float:
    """How much the layer wants."""
    return dispersion ** (1 / tau1) * shift ** (1 / tau2)


def dispersion_and_shift(weights_HWS: list[list[Vector]]) -> tuple[float, float]:
    """Entropy of the window's rows, and variance over them, both summed over all prefix columns and heads."""
    dispersion = shift = 0.0
    for columns in _prefix_columns(weights_HWS):
        dispersion -= sum(weight * log(weight + TINY) for column in columns for weight in column)
        shift += sum(_variance(column) for column in columns)
    return dispersion, shift


def indicator(weights_HWS: list[list[Vector]], num_kv_heads: int, gamma: float, kernel: int = 5) -> list[Vector]:
    """[K][N]: mean plus gamma times variance of what the window's rows pay to a token, mean-pooled, group mean."""
    per_head = []
    for columns in _prefix_columns(weights_HWS):
        raw_N = [_mean(column) + gamma * _variance(column) for column in columns]
        per_head.append(pooled(raw_N, kernel, "avg"))
    per_kv_head = groups(per_head, num_kv_heads)
    return [[score / len(group) for score in add_up(group)] for group in per_kv_head]


def allocate(preferences: Vector, num_prefix: int, base: int, least: int = 0) -> list[int]:
    """Prefix tokens of each layer, `base` on average: in proportion to the preferences, none above `num_prefix`.

    The paper has no `least`, a number of tokens below which no layer may fall."""
    total = base * len(preferences)
    parts = [int(preference / sum(preferences) * total) for preference in preferences]
    shares = [max(least, min(part, num_prefix)) for part in parts]
    clipped = max(sum(parts), least * len(parts)) - sum(shares)
    shares = _spread(shares, clipped, num_prefix) if clipped >= 0 else _take(shares, -clipped, least)
    return _spread(shares, total - sum(shares), num_prefix)


def _spread(shares: list[int], amount: int, most: int) -> list[int]:
    """Adds `amount` evenly to those below `most`, the remainder to the lowest places; repeats while any is left."""
    while amount > 0:
        open_places = [place for place, share in enumerate(shares) if share < most]
        part, remainder = divmod(amount, len(open_places))
        for rank, place in enumerate(open_places):
            given = min(part + (rank < remainder), most - shares[place])
            shares[place] += given
            amount -= given
    return shares


def _take(shares: list[int], amount: int, least: int) -> list[int]:
    """Removes `amount` in the same way, leaving each at least `least`."""
    return [-share for share in _spread([-share for share in shares], amount, -least)]


def _prefix_columns(weights_HWS: list[list[Vector]]) -> list[list[Vector]]:
    """[H][N][W]: what each token before the window gets from the window's rows."""
    num_prefix = len(weights_HWS[0][0]) - len(weights_HWS[0])
    return [[list(column) for column in zip(*rows, strict=True)][:num_prefix] for rows in weights_HWS]


def _mean(values: Vector) -> float:
    return sum(values) / len(values)


def _variance(values: Vector) -> float:
    """Unbiased; a single value varies by nothing."""
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
