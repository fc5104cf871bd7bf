"""CAKE (ICLR 2025): the layers compete for the prompt's tokens, in proportion to their weights.

The paper divides anew after every layer of the prefill ("cascading"), which bounds the memory of the prefill itself and
ends with what one division after the last layer gives. Here the exact KV stays anyway, so it is divided once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packlight.compress.budget import Site, base_budget, least_kept
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class CakeBudget:
    """All layers that are no sliding-window layers keep their number x base budget together, exactly; the heads of a
    layer all keep the same."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        least, base = least_kept(spec), base_budget(spec, num_tokens)
        return min(num_tokens, least + site.num_layers * (base - least))

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return self.max_kept(spec, num_tokens, site) * site.num_kv_heads

    def max_kept_together(self, spec: PackSpec, num_tokens: int, num_layers: int, num_kv_heads: int) -> int:
        return base_budget(spec, num_tokens) * num_layers * num_kv_heads

    def divide(self, spec: PackSpec, layers: Sequence[Candidates]) -> list[list[int]]:
        num_tokens, num_heads = layers[0].num_tokens, layers[0].site.num_kv_heads
        lengths = shares(
            [candidates.layer_weight for candidates in layers],
            (base_budget(spec, num_tokens) - spec.window) * len(layers),
            least=least_kept(spec) - spec.window,
            most=num_tokens - spec.window,
        )
        return [[spec.window + length] * num_heads for length in lengths]


def shares(weights: Sequence[float], total: int, *, least: int, most: int) -> list[int]:
    """`total` divided in proportion to `weights` >= 0 and rounded down, within `least` and `most`.

    What a layer cannot take is spread evenly over those that can, then what rounding lost; remainders go to the lower
    layers. The sum is exact. Needs least * layers <= total <= most * layers."""
    assert least * len(weights) <= total <= most * len(weights), (least, most, total, len(weights))
    sum_weights = sum(weights)
    parts = [weight / sum_weights if sum_weights > 0 else 1 / len(weights) for weight in weights]
    quotas = [int(part * total) for part in parts]
    lengths = [min(max(quota, least), most) for quota in quotas]
    _settle(lengths, max(sum(quotas), least * len(weights)), least=least, most=most)
    _settle(lengths, total, least=least, most=most)
    return lengths


def _settle(lengths: list[int], total: int, *, least: int, most: int) -> None:
    """Bring the sum to `total`, every length that has room for it sharing evenly."""
    while (missing := total - sum(lengths)) != 0:
        step = 1 if missing > 0 else -1
        able = [layer for layer, length in enumerate(lengths) if least <= length + step <= most]
        each, left = divmod(abs(missing), len(able))
        for place, layer in enumerate(able):
            length = lengths[layer] + step * (each + (place < left))
            lengths[layer] = min(max(length, least), most)
