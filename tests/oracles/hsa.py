"""RocketKV's hybrid sparse attention (arXiv 2502.14051, section 3.4), for one KV head with the G queries of its group.

Pages are known by their keys' extremes. One set of head dimensions and one sign per dimension serve the whole group.
"""

from __future__ import annotations

from math import sqrt

from tests.oracles.plain import Vector, best, softmax
from tests.oracles.quest import extremes


def page_scores(queries: list[Vector], pages: list[list[Vector]], num_dims: int, *, per_token: bool) -> Vector:
    """One score per page: the mean over the group of a softmax of estimated q.k, tempered for the dimensions left out.

    `per_token`: the softmax runs over tokens, each with its page's estimate, as in the paper; else over pages. A
    page's score is the share of one token then, and all of its tokens have the same."""
    dims = _dims(queries, num_dims)
    signs = [sum(column) > 0 for column in zip(*queries, strict=True)]
    bounds = [extremes(keys) for keys in pages]
    total = [0.0] * len(pages)
    counts = [len(keys) if per_token else 1 for keys in pages]
    for query in queries:
        estimates = [
            sum(query[dim] * (greatest if signs[dim] else least)[dim] for dim in dims) for least, greatest in bounds
        ]
        temperature = _temperature(query, dims)
        shares = softmax([estimate / temperature for estimate in estimates], counts)
        total = [score + share / len(queries) for score, share in zip(total, shares, strict=True)]
    return total


def _dims(queries: list[Vector], count: int) -> list[int]:
    """Where the group's queries are largest, added up in absolute value."""
    return best([sum(abs(value) for value in column) for column in zip(*queries, strict=True)], count)


def _temperature(query: Vector, dims: list[int]) -> float:
    """sqrt(d), lowered by the share of the query's weight that is looked at (SparQ, arXiv 2312.04985)."""
    looked_at = sum(abs(query[dim]) for dim in dims) / sum(abs(value) for value in query)
    return sqrt(len(query) * looked_at)
