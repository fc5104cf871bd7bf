"""How many tokens each layer and KV head keep, and the pages a decode worker must have free for them.

Two questions, asked at different times. *Before* anything is computed, admission asks for upper bounds (`max_kept`,
`max_pages`). *After* the scores are there, selection asks for the lengths themselves (`LayerBudget.allot` or
`ModelBudget.divide`, `base.py`). A budget that depends on scores answers the first with a bound and the second exactly.

Knows numbers only; imports without torch, and so do the files of `budgets/` at module level. Rules that hold for every
budget live here and not in the budgets: a recipe that drops nothing, a prompt that is no longer than its budget, and a
sliding-window layer.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple, Protocol, cast

from packlight.compress.layout import pages_of
from packlight.compress.parts import BUDGETS
from packlight.compress.recipes import find_recipe
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


class SharedBudget(Budget, Protocol):
    """A budget that divides tokens among layers: what one gets, another does not."""

    def max_kept_together(self, spec: PackSpec, num_tokens: int, num_layers: int, num_kv_heads: int) -> int:
        """The most that all heads of `num_layers` layers keep together."""
        ...


def least_kept(spec: PackSpec) -> int:
    """Tokens that any head keeps of a prompt that has so many: sinks, window, and one to choose."""
    return spec.sinks + spec.window + 1


def base_budget(spec: PackSpec, num_tokens: int) -> int:
    """Tokens per KV head that the request asks for, of a prompt of `num_tokens`: its budget, or its ratio rounded up.

    At least sinks + window + 1 and at most the prompt. The whole prompt when the recipe drops nothing."""
    if not find_recipe(spec.recipe).drops_tokens:
        return num_tokens
    return min(max(_asked(spec, num_tokens), least_kept(spec)), num_tokens)


def read_budget(spec: PackSpec, num_tokens: int) -> int:
    """Tokens per KV head that a decode step reads at most, of a prompt of `num_tokens`; all of it for dense readers.

    Where tokens are dropped as well, half of the budget goes into finding the other half (RocketKV)."""
    recipe = find_recipe(spec.recipe)
    if not recipe.reads_pages:
        return num_tokens
    if not recipe.drops_tokens:
        return min(max(1, _asked(spec, num_tokens)), num_tokens)
    return num_tokens if keeps_all(spec, num_tokens) else base_budget(spec, num_tokens) // 2


def keeps_all(spec: PackSpec, num_tokens: int) -> bool:
    """A base budget that covers the prompt is the identity, whatever the method would make of it.

    Not so where no budget was asked for because the method finds its own: then it is only an upper bound."""
    if num_tokens <= least_kept(spec):
        return True
    is_open = spec.budget_tokens is None and spec.ratio is None and find_recipe(spec.recipe).finds_length
    return not is_open and base_budget(spec, num_tokens) >= num_tokens


def max_kept(spec: PackSpec, num_tokens: int, site: Site, sliding_window: int | None = None) -> int:
    """Upper bound of the prompt tokens kept by any one KV head of the layer, known before anything is computed.

    `sliding_window` is the layer's, in tokens: such a layer keeps exactly that many, or the whole shorter prompt. What
    a mass floor adds is not in here: nobody knows it before the scores."""
    if sliding_window is not None:
        return min(sliding_window, num_tokens)
    return num_tokens if keeps_all(spec, num_tokens) else load_budget(spec).max_kept(spec, num_tokens, site)


def max_pages(
    spec: PackSpec, model: ModelSpec, num_prompt_tokens: int, page_size: int, *, num_new_tokens: int = 0
) -> int:
    """Upper bound of the head pages that a request's packed KV takes, over all layers and KV heads.

    `num_new_tokens` counts the tokens after the prompt, of which every head keeps each one; 0 gives the prompt part.
    What a mass floor adds is not in here."""
    by_layer = max_pages_by_layer(spec, model, num_prompt_tokens, page_size, num_new_tokens=num_new_tokens)
    if not find_recipe(spec.recipe).divides_layers or keeps_all(spec, num_prompt_tokens):
        return sum(by_layer)
    competing = [layer for layer, window in enumerate(_windows(model)) if window is None]
    budget = cast(SharedBudget, load_budget(spec))
    num_tokens = budget.max_kept_together(spec, num_prompt_tokens, len(competing), model.num_kv_heads)
    together = _most_pages(num_tokens, len(competing) * model.num_kv_heads, num_new_tokens, page_size)
    return sum(by_layer) - max(0, sum(by_layer[layer] for layer in competing) - together)


def max_pages_by_layer(
    spec: PackSpec, model: ModelSpec, num_prompt_tokens: int, page_size: int, *, num_new_tokens: int = 0
) -> list[int]:
    """Upper bound of each layer's head pages. Where layers compete any one may get much, and the sum is more than
    `max_pages`."""
    budget = None if keeps_all(spec, num_prompt_tokens) else load_budget(spec)
    windows = _windows(model)

    def pages(layer: int) -> int:
        site = Site(layer, model.num_layers, model.num_kv_heads)
        return _layer_pages(spec, budget, num_prompt_tokens, site, windows[layer], page_size, num_new_tokens)

    if find_recipe(spec.recipe).grades_layers:
        return [pages(layer) for layer in range(len(windows))]
    # Every request asks, and a model has many layers: those with one window are alike, and one of them is asked about.
    by_window = {window: pages(windows.index(window)) for window in set(windows)}
    return [by_window[window] for window in windows]


def load_budget(spec: PackSpec) -> Budget:
    """The budget of a recipe that drops tokens."""
    name = find_recipe(spec.recipe).budget
    assert name is not None, "a recipe that drops tokens has a budget"
    budget: Budget = BUDGETS.load(name)()
    return budget


def _asked(spec: PackSpec, num_tokens: int) -> int:
    if spec.budget_tokens is not None:
        return spec.budget_tokens
    # 0.07 * 100 is a hair above 7; the rounding keeps it from costing a token.
    return ceil(round((1.0 if spec.ratio is None else spec.ratio) * num_tokens, 6))


def _layer_pages(
    spec: PackSpec,
    budget: Budget | None,
    num_tokens: int,
    site: Site,
    sliding_window: int | None,
    page_size: int,
    num_new_tokens: int,
) -> int:
    """Without a `budget` every token of the prompt is kept."""
    num_heads = site.num_kv_heads
    if budget is None or sliding_window is not None:
        kept = num_tokens if sliding_window is None else min(sliding_window, num_tokens)
        return num_heads * pages_of(kept + num_new_tokens, page_size)
    per_head = num_heads * pages_of(budget.max_kept(spec, num_tokens, site) + num_new_tokens, page_size)
    in_layer = budget.max_kept_in_layer(spec, num_tokens, site)
    return min(per_head, _most_pages(in_layer, num_heads, num_new_tokens, page_size))


def _most_pages(num_tokens: int, num_heads: int, num_new_tokens: int, page_size: int) -> int:
    """Pages of heads that share `num_tokens` anyhow and then get `num_new_tokens` each."""
    # Each head rounds up to whole pages on its own: sum ceil(n/p) <= (sum n + heads * (p - 1)) / p.
    return (num_tokens + num_heads * (num_new_tokens + page_size - 1)) // page_size


def _windows(model: ModelSpec) -> tuple[int | None, ...]:
    return model.sliding_windows or (None,) * model.num_layers
