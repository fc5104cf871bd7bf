"""H2O (arXiv 2306.14048, section 4): a token matters as much as all queries that saw it attended to it, together.

The paper has one key head per query head; heads that share keys are added, as is usual.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.oracles.plain import Vector, add_up, best, groups, softmax


class Safe(NamedTuple):
    """Tokens at either end that are never dropped. The paper has no sinks."""

    sinks: int
    recent: int


def accumulated(weights_HSS: list[list[Vector]], num_kv_heads: int) -> list[Vector]:
    """[K][S]: column sums of the full S x S attention over every prompt row and the group's heads."""
    per_head = [add_up(rows) for rows in weights_HSS]
    return [add_up(group) for group in groups(per_head, num_kv_heads)]


def kept(scores_S: Vector, budget: int, recent: int, sinks: int = 0) -> list[int]:
    """The `recent` last tokens, and the heaviest of those before them up to `budget` in all. The paper has no sinks."""
    border = len(scores_S) - recent
    heavy = [sinks + place for place in best(scores_S[sinks:border], budget - recent - sinks)]
    return [*range(sinks), *heavy, *range(border, len(scores_S))]


def decode(
    masses: dict[int, float], keys: list[Vector], queries: list[list[Vector]], scale: float, *, budget: int, safe: Safe
) -> list[list[int]]:
    """The tokens of one KV head that each step attends to, ascending: algorithm 1, with eviction while decoding.

    `masses` are the prompt's kept tokens and what they have had; `keys` are of all tokens, `queries[i]` the group's
    queries of the i-th generated one. A step stores its token, attends to at most `budget` and then drops the one with
    the least mass, of equals the older, so that there is room for the next."""
    seen, steps = dict(masses), []
    for step, group in enumerate(queries):
        while len(seen) >= budget:
            del seen[_victim(seen, safe)]
        seen[len(keys) - len(queries) + step] = 0.0
        tokens = sorted(seen)
        for query in group:
            products = [scale * sum(a * b for a, b in zip(query, keys[token], strict=True)) for token in tokens]
            for token, share in zip(tokens, softmax(products, [1] * len(tokens)), strict=True):
                seen[token] += share
        steps.append(tokens)
    return steps


def _victim(seen: dict[int, float], safe: Safe) -> int:
    in_order = sorted(seen)
    candidates = in_order[safe.sinks : len(in_order) - safe.recent]
    return min(candidates, key=lambda token: (seen[token], token))
