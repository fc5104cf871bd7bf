"""What is compared: recipes, codecs and compression factors, each combination as a request would ask for it.

Knows names and the recipe table. Runs nothing, and imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import yaml

from packlight.compress.options import resolve
from packlight.compress.parts import CODECS
from packlight.compress.recipes import RECIPES, find_recipe
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import PackSpec

NATIVE = "native"
# Options of the `kv` object that span the grid.
FLAGS = MappingProxyType({"recipe": "--recipes", "codec": "--codecs", "budget": "--factors", "ratio": "--factors"})


@dataclass(frozen=True, slots=True)
class RecipeChoice:
    """A recipe with the options that it is measured with. `label` is how it was asked for: `snapkv:kernel=5`."""

    label: str
    name: str
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to pack a prompt. `factor` is the compression asked for: the budget is 1 / factor of the prompt."""

    recipe: str
    codec: str
    factor: float
    spec: PackSpec


def parse_recipes(text: str) -> tuple[RecipeChoice, ...]:
    """Recipes separated by commas, each with options of the `kv` object behind colons; `all` is the whole table.

    Raises ConfigError for what is not in the table."""
    labels = [label.strip() for label in text.split(",") if label.strip()]
    names = [name for label in labels for name in (RECIPES if label == "all" else [label])]
    return tuple(_parse_recipe(label) for label in dict.fromkeys(names))


def parse_codecs(text: str) -> tuple[str, ...]:
    """Codecs separated by commas; `all` is every one. Raises ConfigError for unknown ones."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = [name for each in asked for name in (CODECS if each == "all" else [each])]
    for name in names:
        if name not in CODECS:
            raise ConfigError(f"unknown codec {name!r}: choose from {', '.join(CODECS)}")
    return tuple(dict.fromkeys(names))


def make_variant(choice: RecipeChoice, codec: str, factor: float) -> Variant:
    """Raises ConfigError for a factor below 1, and for options that a request could not ask for either."""
    if factor < 1:
        raise ConfigError(f"factor {factor:g} is below 1: it says how many times smaller than the prompt the budget is")
    body: dict[str, object] = {"recipe": choice.name, "codec": codec, **dict(choice.options)}
    if find_recipe(choice.name).has_budget:
        body["ratio"] = 1 / factor
    try:
        spec = resolve(body, default_recipe="none", default_budget=None)
    except InvalidRequest as error:
        raise ConfigError(f"{choice.label}: {error.message}") from None
    if dict(spec.params).get("evict"):
        raise ConfigError(f"{choice.label}: eviction while decoding is not part of the evaluation; leave evict out")
    return Variant(choice.label, codec, factor, spec)


def make_grid(
    recipes: Sequence[RecipeChoice], codecs: Sequence[str], factors: Sequence[float], *, coded: Sequence[str]
) -> tuple[Variant, ...]:
    """Every recipe with the native codec, and those named in `coded` with all `codecs`, at every factor.

    A recipe without a budget has no factor but 1. Exact KV is always among them: all are held against it."""
    exact = RecipeChoice("none", "none")
    sites = [(exact, NATIVE), *((choice, NATIVE) for choice in recipes)]
    sites += [(choice, codec) for choice in (exact, *recipes) if choice.name in coded for codec in codecs]
    return tuple(
        make_variant(choice, codec, factor)
        for choice, codec in _unique(sites)
        for factor in (factors if find_recipe(choice.name).has_budget else (1,))
    )


def _unique(sites: Iterable[tuple[RecipeChoice, str]]) -> list[tuple[RecipeChoice, str]]:
    return list({(choice.label, codec): (choice, codec) for choice, codec in sites}.values())


def _parse_recipe(label: str) -> RecipeChoice:
    name, *options = label.split(":")
    try:
        find_recipe(name)
    except InvalidRequest as error:
        raise ConfigError(error.message) from None
    pairs = [option.partition("=") for option in options]
    for option, (key, equals, value) in zip(options, pairs, strict=True):
        if not (key and equals and value):
            raise ConfigError(f"--recipes {label}: expected option=value after the colon, got {option!r}")
        if key in FLAGS:
            raise ConfigError(f"--recipes {label}: {key} has a flag of its own, {FLAGS[key]}")
    return RecipeChoice(label, name, tuple((key, yaml.safe_load(value)) for key, _, value in pairs))
