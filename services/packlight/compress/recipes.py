"""The table of packing methods, and the reading of a request's `kv` object.

A recipe is a scorer, a budget, a reader and a codec, each named here and implemented in one file elsewhere. This file
knows names, papers and the limits of the options. It imports without torch, because the router validates requests with
it; the parts are imported by whoever calls `Registry.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.registry import Registry
from packlight.core.types import PackSpec

SCORERS = Registry(
    "scorer",
    {
        "position": "packlight.compress.scorers.position:PositionScorer",
        "window": "packlight.compress.scorers.window:WindowScorer",
    },
)
BUDGETS = Registry("budget", {"uniform": "packlight.compress.budget:UniformBudget"})
READERS = Registry("reader", {"dense": "packlight.compress.readers.dense:DenseReader"})
CODECS = Registry(
    "codec",
    {
        "native": "packlight.compress.codecs.native:NativeCodec",
        "bf16": "packlight.compress.codecs.bf16:BF16Codec",
    },
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method. `scorer` and `budget` are None for the recipe that keeps every token. `paper` is an arXiv number."""

    name: str
    scorer: str | None
    budget: str | None
    reader: str
    codec: str
    paper: str | None
    summary: str

    @property
    def drops_tokens(self) -> bool:
        return self.scorer is not None


_TABLE = (
    Recipe("none", None, None, "dense", "native", None, "Ships every token: exact."),
    Recipe(
        "streaming_llm",
        "position",
        "uniform",
        "dense",
        "native",
        "2309.17453",
        "The first tokens (attention sinks) and the most recent ones. Fluent, but cannot recall the middle.",
    ),
    Recipe(
        "snapkv",
        "window",
        "uniform",
        "dense",
        "native",
        "2404.14469",
        "The tokens that the last queries of the prompt attend to, with their neighbours.",
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _TABLE})

DEFAULT_RATIO = 0.25
_DEFAULT = PackSpec()
# Inclusive. The upper ends bound what one request can make a worker compute, and fit 32-bit wire fields.
LIMITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"budget": (1, 2**31 - 1), "window": (1, 1024), "sinks": (0, 256), "kernel": (1, 1023)}
)
_OPTIONS = ("recipe", "budget", "ratio", "window", "sinks", "kernel")


def find_recipe(name: str) -> Recipe:
    """The row called `name`. Raises InvalidRequest listing the known names."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise _invalid("recipe", f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return recipe


def resolve(options: Mapping[str, object], *, default_recipe: str, default_budget: int | None) -> PackSpec:
    """The packing that a request body's `kv` object asks for, every default filled in.

    `options` is parsed JSON; an option that is null counts as absent. `default_budget` (tokens per KV head) applies to
    recipes that drop tokens when the request gives neither `budget` nor `ratio`; without it the ratio is 0.25.
    Raises InvalidRequest with `param="kv.<option>"`, the value and the limit."""
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in _OPTIONS:
            raise _invalid(key, f"no such option; known are {', '.join(_OPTIONS)}")
    recipe = find_recipe(_text(given.get("recipe", default_recipe)))
    budget, ratio = _share(given, recipe, default_budget)
    spec = PackSpec(
        recipe=recipe.name,
        budget_tokens=budget,
        ratio=ratio,
        window=_integer(given, "window", _DEFAULT.window),
        sinks=_integer(given, "sinks", _DEFAULT.sinks),
        kernel=_kernel(given),
    )
    _check_room(spec, is_default="budget" not in given)
    return spec


def check_defaults(default_recipe: str, default_budget: int | None) -> None:
    """Checks the fleet's defaults once, at start. Raises ConfigError where `resolve` of an empty `kv` object fails."""
    try:
        resolve({}, default_recipe=default_recipe, default_budget=default_budget)
    except InvalidRequest as error:
        raise ConfigError(error.message) from None


def recipe_table_markdown() -> str:
    """The table of recipes for the README, one row a recipe."""
    rows = ["| recipe | scorer | budget | reader | codec | paper | keeps |", "|---|---|---|---|---|---|---|"]
    for recipe in RECIPES.values():
        paper = f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})" if recipe.paper else "-"
        parts = (recipe.scorer or "-", recipe.budget or "-", recipe.reader, recipe.codec)
        rows.append(f"| `{recipe.name}` | {' | '.join(parts)} | {paper} | {recipe.summary} |")
    return "\n".join(rows) + "\n"


def _share(given: Mapping[str, object], recipe: Recipe, default_budget: int | None) -> tuple[int | None, float | None]:
    """(budget, ratio) of the request or the default; both None exactly when the recipe keeps every token."""
    asked = [key for key in ("budget", "ratio") if key in given]
    if not recipe.drops_tokens:
        if asked:
            raise _invalid(
                asked[0], f"got {given[asked[0]]!r}, but recipe {recipe.name!r} keeps every token; leave it out"
            )
        return None, None
    if len(asked) == 2:
        raise _invalid("ratio", f"got ratio {given['ratio']!r} and budget {given['budget']!r}; give one of them")
    if "ratio" in given:
        return None, _ratio(given["ratio"])
    if "budget" in given:
        return _integer(given, "budget", 0), None
    return (None, DEFAULT_RATIO) if default_budget is None else (default_budget, None)


def _check_room(spec: PackSpec, *, is_default: bool) -> None:
    """The sinks and the window are always kept; a budget must leave room for at least one scored token."""
    least = spec.sinks + spec.window + 1
    if spec.budget_tokens is None or spec.budget_tokens >= least:
        return
    source = " (the default)" if is_default else ""
    raise _invalid(
        "budget",
        f"got {spec.budget_tokens}{source}, must be at least {least} = {spec.sinks} sinks + {spec.window} window + 1; "
        "raise it, or lower kv.sinks or kv.window",
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _invalid("recipe", f"got {value!r}, must be a string: one of {', '.join(RECIPES)}")
    return value


def _integer(given: Mapping[str, object], key: str, default: int) -> int:
    low, high = LIMITS[key]
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _invalid(key, f"got {value!r}, must be an integer from {low} to {high}")
    return value


def _kernel(given: Mapping[str, object]) -> int | None:
    if "kernel" not in given:
        return None
    kernel = _integer(given, "kernel", 1)
    if kernel % 2 == 0:
        raise _invalid("kernel", f"got {kernel}, must be odd, so that pooling is centred on its token")
    return kernel


def _ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise _invalid("ratio", f"got {value!r}, must be a number above 0 and at most 1")
    return float(value)


def _invalid(key: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"kv.{key}: {problem}", param=f"kv.{key}")
