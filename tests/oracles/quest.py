"""Quest (arXiv 2406.10774, section 3.3): the extremes of a page's keys bound what any of them can score."""

from __future__ import annotations

from tests.oracles.plain import Vector, best


def extremes(keys: list[Vector]) -> tuple[Vector, Vector]:
    """(least, greatest) of each dimension over the keys of a page."""
    return [min(column) for column in zip(*keys, strict=True)], [max(column) for column in zip(*keys, strict=True)]


def bound(query: Vector, keys: list[Vector]) -> float:
    """At least q.k for every key k of the page."""
    least, greatest = extremes(keys)
    return sum(max(q * low, q * high) for q, low, high in zip(query, least, greatest, strict=True))


def chosen(scores: Vector, count: int, num_first: int = 0) -> list[int]:
    """`count` pages, ascending: the last one always, the first `num_first` (the sinks' pages) too, then the best."""
    last = len(scores) - 1
    always = sorted({*range(min(num_first, len(scores))), last})
    if count >= len(scores):
        return list(range(len(scores)))
    forced = [float("inf") if page in always else score for page, score in enumerate(scores)]
    return best(forced, max(count, len(always)))
