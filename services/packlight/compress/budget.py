"""How many tokens each layer and KV head keep, and the pages a decode worker must have free for them.

Two questions, asked at different times. *Before* anything is computed, admission asks for upper bounds (`max_kept`,
`max_pages`). *After* the scores are there, selection asks for the lengths themselves (`Budget.allot`). A budget that
depends on scores (per head, per layer) answers the first with a bound and the second exactly.

Knows numbers only; imports without torch. Rules that hold for every budget live here and not in the budgets: a recipe
that drops nothing, a prompt that is no longer than its budget, and a sliding-window layer.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple, Protocol

from packlight.compress.layout import pages_of
from packlight.compress.recipes import BUDGETS, find_recipe
from packlight.core.types import ModelSpec, PackSpec


class Site(NamedTuple):
    """Where a budget is spent."""

    layer: int
    num_layers: int
    num_kv_heads: int


class Budget(Protocol):
    """Divides a request's base budget among layers and KV heads. Only asked when the prompt exceeds the base.

    All counts are prompt tokens per KV head, sinks and window included; none exceeds the prompt's length."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        """The most that any one head of the layer keeps, whatever the scores."""
        ...

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        """The most that all heads of the layer keep together: less than heads x `max_kept` when heads compete."""
        ...

    # The scores are a tensor, which this file must not import: fp32 [K, num_tokens - window], +inf at the sinks.
    def allot(self, spec: PackSpec, num_tokens: int, site: Site, scores_KN: Any) -> list[int]:
        """The tokens each head keeps: at least sinks + window, within both bounds."""
        ...


class UniformBudget:
    """Every layer and head keep the same number: SnapKV (arXiv 2404.14469), StreamingLLM (arXiv 2309.17453)."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens)

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens) * site.num_kv_heads

    def allot(self, spec: PackSpec, num_tokens: int, site: Site, scores_KN: Any) -> list[int]:
        return [base_budget(spec, num_tokens)] * site.num_kv_heads


def base_budget(spec: PackSpec, num_tokens: int) -> int:
    """Tokens per KV head that the request asks for, of a prompt of `num_tokens`: its budget, or its ratio rounded up.

    At least sinks + window + 1 and at most the prompt. The whole prompt when the recipe drops nothing."""
    if not find_recipe(spec.recipe).drops_tokens:
        return num_tokens
    if spec.budget_tokens is not None:
        asked = spec.budget_tokens
    else:
        # 0.07 * 100 is a hair above 7; the rounding keeps it from costing a token.
        asked = ceil(round((1.0 if spec.ratio is None else spec.ratio) * num_tokens, 6))
    return min(max(asked, spec.sinks + spec.window + 1), num_tokens)


def keeps_all(spec: PackSpec, num_tokens: int) -> bool:
    """A base budget that covers the prompt is the identity, whatever the method would make of it."""
    return base_budget(spec, num_tokens) >= num_tokens


def max_kept(spec: PackSpec, num_tokens: int, site: Site, sliding_window: int | None = None) -> int:
    """Upper bound of the prompt tokens kept by any one KV head of the layer, known before anything is computed.

    `sliding_window` is the layer's, in tokens: such a layer keeps exactly that many, or the whole shorter prompt."""
    if sliding_window is not None:
        return min(sliding_window, num_tokens)
    return num_tokens if keeps_all(spec, num_tokens) else _budget(spec).max_kept(spec, num_tokens, site)


def max_pages(
    spec: PackSpec, model: ModelSpec, num_prompt_tokens: int, page_size: int, *, num_new_tokens: int = 0
) -> int:
    """Upper bound of the head pages that a request's packed KV takes, over all layers and KV heads.

    `num_new_tokens` counts the tokens after the prompt, of which every head keeps each one; 0 gives the prompt part."""
    windows = model.sliding_windows or (None,) * model.num_layers
    total = 0
    for layer, sliding_window in enumerate(windows):
        site = Site(layer, model.num_layers, model.num_kv_heads)
        total += _layer_pages(spec, num_prompt_tokens, site, sliding_window, page_size, num_new_tokens)
    return total


def _layer_pages(
    spec: PackSpec, num_tokens: int, site: Site, sliding_window: int | None, page_size: int, num_new_tokens: int
) -> int:
    num_heads = site.num_kv_heads
    per_head = num_heads * pages_of(max_kept(spec, num_tokens, site, sliding_window) + num_new_tokens, page_size)
    if sliding_window is not None or keeps_all(spec, num_tokens):
        return per_head
    # Each head rounds up to whole pages on its own: sum ceil(n/p) <= (sum n + heads * (p - 1)) / p.
    layer_tokens = _budget(spec).max_kept_in_layer(spec, num_tokens, site) + num_heads * num_new_tokens
    return min(per_head, (layer_tokens + num_heads * (page_size - 1)) // page_size)


def _budget(spec: PackSpec) -> Budget:
    name = find_recipe(spec.recipe).budget
    assert name is not None, "a recipe that drops tokens has a budget"
    budget: Budget = BUDGETS.load(name)()
    return budget
