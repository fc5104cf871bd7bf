"""FreeKV (arXiv 2505.13109, section 3): read what the previous step's query would choose, unless the query has turned.

For one KV head with the G queries of its group.
"""

from __future__ import annotations

from math import sqrt

from tests.oracles.plain import Vector, softmax
from tests.oracles.quest import bound


def page_scores(queries: list[Vector], pages: list[list[Vector]], scale: float, *, per_token: bool) -> Vector:
    """Each query's page bounds through a softmax, then the mean over the group. The softmax runs over pages in the
    paper, whose pages are all full; `per_token` lets a page count as often as it holds tokens."""
    total = [0.0] * len(pages)
    counts = [len(keys) if per_token else 1 for keys in pages]
    for query in queries:
        shares = softmax([scale * bound(query, keys) for keys in pages], counts)
        total = [score + share / len(queries) for score, share in zip(total, shares, strict=True)]
    return total


def asked_by(now: list[Vector], previous: list[Vector] | None, threshold: float) -> list[Vector]:
    """Whose choice a step reads: the previous step's queries, or this one's where the group's mean cosine between the
    two is below the threshold, and in the first step."""
    if previous is None:
        return now
    cosines = [_cosine(query, before) for query, before in zip(now, previous, strict=True)]
    return now if sum(cosines) / len(cosines) < threshold else previous


def _cosine(a: Vector, b: Vector) -> float:
    norms = sqrt(sum(x * x for x in a)) * sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms
