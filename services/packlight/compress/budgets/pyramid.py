"""PyramidKV (arXiv 2406.02069): much in the first layers, little in the last, a straight line between.

The published integer schedule: of the mean m prefix tokens per layer, the last layer keeps m // beta and the first what
makes them m on average, unless the prompt is shorter than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packlight.compress.budget import Site, base_budget, least_kept
from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class PyramidBudget:
    """A layer's depth counts among all layers of the model. Sliding-window layers have a place in the schedule, but no
    use for it: where they alternate with others, the others keep about the mean."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        base = base_budget(spec, num_tokens)
        in_prefix = schedule(num_tokens, base, spec.window, param_of(spec, "beta"), site)
        return max(spec.window + in_prefix, least_kept(spec))

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return self.max_kept(spec, num_tokens, site) * site.num_kv_heads

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        kept = self.max_kept(spec, candidates.num_tokens, candidates.site)
        return [kept] * candidates.site.num_kv_heads


def schedule(num_tokens: int, budget: int, window: int, beta: float, site: Site) -> int:
    """Prefix tokens that the layer at `site` keeps, of a prompt of `num_tokens` > `budget` tokens, window included.

    The step is rounded down, so all layers together may keep a few tokens more than their number x budget. A prompt
    shorter than twice the mean is kept evenly."""
    mean, num_prefix = budget - window, num_tokens - window
    if num_tokens < 2 * mean or site.num_layers == 1:
        return mean
    last = int(mean // beta)
    first = 2 * mean - last
    if first >= num_prefix:
        first, last = num_prefix, 2 * mean - num_prefix
    return first - site.layer * ((first - last) // (site.num_layers - 1))
