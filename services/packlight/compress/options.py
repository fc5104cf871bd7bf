"""Reading a request's `kv` object: which recipe, how small, with which constants.

Knows parsed JSON and the recipe table. Fills in every default, and refuses what it does not understand with the option,
the value and the limit. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from packlight.compress.parts import CODECS, Param, codecs_for
from packlight.compress.recipes import RECIPES, Recipe, codec_of, find_recipe
from packlight.core.errors import InvalidRequest
from packlight.core.types import ModelSpec, PackSpec, Pooling

_DEFAULT = PackSpec()
# Inclusive. The upper ends bound what one request can make a worker compute, and fit 32-bit wire fields.
LIMITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"budget": (1, 2**31 - 1), "window": (1, 1024), "sinks": (0, 256), "kernel": (1, 1023)}
)


def resolve(
    options: Mapping[str, object], *, default_recipe: str, default_budget: int | None, default_floor: float = 0.0
) -> PackSpec:
    """The packing that a request body's `kv` object asks for, every default filled in.

    `options` is parsed JSON; an option that is null counts as absent. `default_budget` (tokens per KV head) applies to
    recipes with a budget when the request gives neither `budget` nor `ratio`; without it the recipe's ratio does.
    Raises InvalidRequest with `param="kv.<option>"`, the value and the limit."""
    given = {key: value for key, value in options.items() if value is not None}
    recipe = find_recipe(_name(given, "recipe", tuple(RECIPES), default_recipe))
    own = {param.name: param for param in recipe.params}
    _check_names(given, recipe)
    budget, ratio = _share(given, recipe, default_budget)
    spec = PackSpec(
        recipe=recipe.name,
        budget_tokens=budget,
        ratio=ratio,
        window=_integer(given, "window", recipe.window),
        sinks=_integer(given, "sinks", _DEFAULT.sinks),
        kernel=_kernel(given, recipe),
        pooling=Pooling(_name(given, "pooling", tuple(Pooling), _DEFAULT.pooling)),
        codec=_name(given, "codec", tuple(CODECS), recipe.codec),
        params=tuple((name, _param(given[name], own[name])) for name in sorted(own) if name in given),
        mass_floor=_floor(given, recipe, default_floor),
    )
    _check_room(spec, recipe, is_default="budget" not in given)
    return spec


def check_model(spec: PackSpec, model: ModelSpec) -> None:
    """Raises InvalidRequest, as `resolve` does, where the model cannot have what a request asks for."""
    if find_recipe(spec.recipe).divides_heads and model.num_kv_heads == 1:
        others = ", ".join(name for name, recipe in RECIPES.items() if not recipe.divides_heads)
        raise _invalid(
            "recipe",
            f"recipe {spec.recipe!r} divides tokens among the KV heads of a layer, and model {model.name!r} has one; "
            f"choose one of {others}",
        )
    if spec.budget_tokens is not None and spec.budget_tokens > model.max_context:
        raise _invalid("budget", f"got {spec.budget_tokens}, model {model.name!r} takes {model.max_context} at most")
    codec, readable = codec_of(spec), codecs_for(model.head_dim)
    if codec not in readable:
        raise _invalid(
            "codec",
            f"codec {codec!r} rotates heads, whose dimension must be a power of two for that; model {model.name!r} has "
            f"{model.head_dim}; choose one of {', '.join(readable)}",
        )


def _check_names(given: Mapping[str, object], recipe: Recipe) -> None:
    """An option without effect is refused like one that does not exist: it would promise something."""
    for key, value in given.items():
        if key in recipe.options:
            continue
        if key in ("budget", "ratio", "floor"):
            raise _invalid(key, f"got {value!r}, but recipe {recipe.name!r} keeps every token; leave it out")
        raise _invalid(key, f"recipe {recipe.name!r} has no such option; it has {', '.join(recipe.options)}")


def _share(given: Mapping[str, object], recipe: Recipe, default_budget: int | None) -> tuple[int | None, float | None]:
    """(budget, ratio) of the request or the default; both None when the recipe has no budget or finds its own."""
    if not recipe.has_budget:
        return None, None
    if "ratio" in given and "budget" in given:
        raise _invalid("ratio", f"got ratio {given['ratio']!r} and budget {given['budget']!r}; give one of them")
    if "ratio" in given:
        return None, _number("ratio", given["ratio"], "a number above 0 and at most 1", low=0, high=1, open_low=True)
    if "budget" in given:
        return _integer(given, "budget", 0), None
    return (None, recipe.ratio) if default_budget is None else (default_budget, None)


def _check_room(spec: PackSpec, recipe: Recipe, *, is_default: bool) -> None:
    """The sinks and the window are always kept; a budget must leave room for at least one scored token."""
    least = spec.sinks + spec.window + 1
    if not recipe.drops_tokens or spec.budget_tokens is None or spec.budget_tokens >= least:
        return
    source = " (the default)" if is_default else ""
    raise _invalid(
        "budget",
        f"got {spec.budget_tokens}{source}, must be at least {least} = {spec.sinks} sinks + {spec.window} window + 1; "
        "raise it, or lower kv.sinks or kv.window",
    )


def _name(given: Mapping[str, object], key: str, known: tuple[str, ...], default: str) -> str:
    value = given.get(key, default)
    if not isinstance(value, str):
        raise _invalid(key, f"got {value!r}, must be a string: one of {', '.join(known)}")
    if value not in known:
        raise _invalid(key, f"unknown {key} {value!r}; choose one of {', '.join(known)}")
    return value


def _integer(given: Mapping[str, object], key: str, default: int) -> int:
    low, high = LIMITS[key]
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _invalid(key, f"got {value!r}, must be an integer from {low} to {high}")
    return value


def _kernel(given: Mapping[str, object], recipe: Recipe) -> int | None:
    if "kernel" not in given:
        return recipe.kernel
    kernel = _integer(given, "kernel", 1)
    if kernel % 2 == 0:
        raise _invalid("kernel", f"got {kernel}, must be odd, so that pooling is centred on its token")
    return kernel


def _param(value: object, param: Param) -> float:
    if param.is_flag:
        if not isinstance(value, bool):
            raise _invalid(param.name, f"got {value!r}, must be true or false")
        return float(value)
    wanted = f"a number from {param.low:g} to {param.high:g}"
    return _number(param.name, value, wanted, low=param.low, high=param.high)


def _floor(given: Mapping[str, object], recipe: Recipe, default: float) -> float:
    if not recipe.drops_tokens:
        return 0.0
    value = given.get("floor", default)
    return _number("floor", value, "a share of the attention mass, from 0 to below 1", low=0, high=1, open_high=True)


def _number(
    key: str, value: object, wanted: str, *, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_above = value > low if open_low else value >= low
        is_below = value < high if open_high else value <= high
        if is_above and is_below:
            return float(value)
    raise _invalid(key, f"got {value!r}, must be {wanted}")


def _invalid(key: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"kv.{key}: {problem}", param=f"kv.{key}")
