"""What every reference needs: attention weights by the book, pooling, and the tie rule.

Names of nested lists end in their axes: H query heads, K KV heads, I rows (queries), S tokens, N prefix tokens.
"""

from __future__ import annotations

from math import exp

from torch import Tensor

Vector = list[float]


def causal_weights(q_IHD: Tensor, k_KSD: Tensor, scale: float) -> list[list[Vector]]:
    """softmax(scale * q.k) as nested lists [H][I][S] in fp64. The rows are the last ones: row i is token S - I + i, and
    sees the tokens 0 .. S - I + i; what it does not see weighs 0. Query head h reads KV head h // (H / K)."""
    num_rows, num_heads, _ = q_IHD.shape
    num_kv_heads, num_tokens, _ = k_KSD.shape
    weights_HIS = []
    for head in range(num_heads):
        k_SD = k_KSD[head // (num_heads // num_kv_heads)].double()
        rows = []
        for row in range(num_rows):
            num_seen = num_tokens - num_rows + row + 1
            scores = scale * (k_SD[:num_seen] @ q_IHD[row, head].double())
            rows.append(scores.softmax(dim=0).tolist() + [0.0] * (num_tokens - num_seen))
        weights_HIS.append(rows)
    return weights_HIS


def add_up(rows: list[Vector]) -> Vector:
    """Element by element."""
    return [sum(column) for column in zip(*rows, strict=True)]


def groups(per_query_head: list[Vector], num_kv_heads: int) -> list[list[Vector]]:
    """The query heads of each KV head."""
    size = len(per_query_head) // num_kv_heads
    return [per_query_head[head * size : (head + 1) * size] for head in range(num_kv_heads)]


def pooled(values: Vector, kernel: int, pooling: str) -> Vector:
    """Max or mean over the odd `kernel` centred on each element. Beyond the ends lie zeros for the mean, which count,
    and nothing for the max."""
    reach, result = kernel // 2, []
    for centre in range(len(values)):
        near = values[max(0, centre - reach) : centre + reach + 1]
        result.append(max(near) if pooling == "max" else sum(near) / kernel)
    return result


def best(values: Vector, count: int) -> list[int]:
    """The places of the `count` largest, ascending; of equals the lower place is better."""
    ranking = sorted(range(len(values)), key=lambda place: (-values[place], place))
    return sorted(ranking[:count])


def kept(scores_N: Vector, num_tokens: int, budget: int, sinks: int = 0) -> list[int]:
    """The tokens one head keeps, ascending: the first `sinks`, everything after the N scored ones, and the best of the
    rest up to `budget` in all."""
    always = [*range(sinks), *range(len(scores_N), num_tokens)]
    others = best(scores_N[sinks:], budget - len(always))
    return sorted(always + [sinks + place for place in others])


def softmax(values: Vector, counts: list[int]) -> Vector:
    """The share of one of `counts[i]` equal entries with `values[i]`, for each i."""
    largest = max(values)
    weights = [exp(value - largest) for value in values]
    normaliser = sum(count * weight for count, weight in zip(counts, weights, strict=True))
    return [weight / normaliser for weight in weights]


def margin(values: Vector, count: int) -> float:
    """How far from a near-tie the choice of the `count` best is: the least relative distance between the worst chosen
    value and a different one. Exactly equal values do not count, since the tie rule decides between them."""
    threshold = sorted(values, reverse=True)[count - 1] if count else max(values)
    return min((abs(value - threshold) / abs(threshold) for value in values if value != threshold), default=1.0)
