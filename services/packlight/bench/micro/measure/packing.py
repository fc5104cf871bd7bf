"""Packing specs by name, and the lengths they leave of a prompt that nobody wrote.

Knows recipes and the selection. Legend: W window rows, S tokens, K KV heads, D head dim, L layers.
"""

from __future__ import annotations

import torch

from packlight.compress.base import LayerView
from packlight.compress.options import check_model, resolve
from packlight.compress.recipes import find_recipe
from packlight.compress.select import Selector
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import ModelSpec, PackSpec


def parse_pack(flag: str, text: str, model: ModelSpec) -> PackSpec:
    """`none`, `snapkv` (its own ratio) or `snapkv@8` (a ratio of 1/8). Raises ConfigError naming the flag."""
    name, at, factor = text.partition("@")
    try:
        options: dict[str, object] = {"recipe": name}
        if at:
            options["ratio"] = 1 / float(factor)
        pack = resolve(options, default_recipe=name, default_budget=None)
        check_model(pack, model)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--{flag}: got {text!r}; expected a recipe, or recipe@factor as in snapkv@8") from None
    except InvalidRequest as error:
        raise ConfigError(f"--{flag}: {text!r}: {error.message}") from None
    return pack


def kept_lengths(model: ModelSpec, pack: PackSpec, num_tokens: int, seed: int = 0) -> list[list[int]]:
    """`[L, K]`: what the recipe keeps of random keys. Budgets that look at scores divide otherwise for a real prompt,
    their sum is the same."""
    if not find_recipe(pack.recipe).drops_tokens:
        return [[num_tokens] * model.num_kv_heads for _ in range(model.num_layers)]
    generator = torch.Generator().manual_seed(seed)
    selector = Selector(pack, num_prompt_tokens=num_tokens, num_tokens=num_tokens)
    lengths: list[list[int]] = [[] for _ in range(model.num_layers)]
    for layer in range(model.num_layers):
        for ready, selection in selector.add(_view(model, pack, layer, num_tokens, generator), _window(model, layer)):
            lengths[ready] = selection.lengths()
    return lengths


def _view(model: ModelSpec, pack: PackSpec, layer: int, num_tokens: int, generator: torch.Generator) -> LayerView:
    heads, dim = model.num_kv_heads, model.head_dim
    accumulated = None
    if find_recipe(pack.recipe).needs_all_queries:
        accumulated = torch.rand(heads, num_tokens, generator=generator)
    return LayerView(
        q_WHD=torch.randn(min(pack.window, num_tokens), heads, dim, generator=generator),
        k_KSD=torch.randn(heads, num_tokens, dim, generator=generator),
        scale=dim**-0.5,
        layer=layer,
        num_layers=model.num_layers,
        accumulated_KS=accumulated,
    )


def _window(model: ModelSpec, layer: int) -> int | None:
    return model.sliding_windows[layer] if model.sliding_windows else None
