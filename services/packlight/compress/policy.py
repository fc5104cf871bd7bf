"""Policy `auto`: how a prompt's KV is packed when its request leaves that open.

Knows the table of the configuration, a prompt's length, whether the request reasons and how much of the prompt is
cached. Does not know text, messages or workers. Pure, and imports without torch.

Two answers are needed before a prompt has its place, because H2O looks at the query of every prompt token and so cannot
use a cached prefix: what to do usually, and what to do where a good part of the prompt is cached. `Plan` holds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from packlight.compress.budget import base_budget, keeps_all
from packlight.compress.options import check_model, resolve
from packlight.compress.recipes import RECIPES, Recipe, find_recipe
from packlight.core.config import KVConfig, PolicyRow
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import ModelSpec, PackSpec

AUTO = "auto"
AUTO_OPTIONS = ("budget", "ratio", "window", "sinks", "codec", "floor")


@dataclass(frozen=True, slots=True)
class Decision:
    """How a prompt's KV is packed. `reason` is a sentence where the policy chose, and empty where the request did.
    `num_protected` first tokens of the prompt are kept because they instruct: see `Plan.protecting`."""

    pack: PackSpec
    reason: str = ""
    num_protected: int = 0

    @property
    def is_auto(self) -> bool:
        return bool(self.reason)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that can be said of a prompt's packing before its place is known.

    `on_hit` is for a place that has `hit_tokens` or more of the prompt cached. Of the prompt's first tokens, up to
    `max_protected` may be protected."""

    usual: Decision
    on_hit: Decision | None = None
    hit_tokens: int = 0
    max_protected: int = 0

    def decide(self, num_cached_tokens: int) -> Decision:
        """The packing at a place where so many of the prompt's first tokens are cached."""
        return self.on_hit if self.on_hit is not None and num_cached_tokens >= self.hit_tokens else self.usual

    def looks_at_cache(self, num_tokens: int) -> bool:
        """Whether it matters where the prompt is cached."""
        return self.on_hit is not None or uses_cache(self.usual.pack, num_tokens)

    def protecting(self, num_tokens: int) -> Plan:
        """The same, with the first `num_tokens` tokens always kept. Raises nothing: too many are none."""
        if not 0 < num_tokens <= self.max_protected:
            return self
        on_hit = None if self.on_hit is None else _protecting(self.on_hit, num_tokens)
        return replace(self, usual=_protecting(self.usual, num_tokens), on_hit=on_hit)


def uses_cache(pack: PackSpec, num_tokens: int) -> bool:
    """Whether a prompt's cached prefix need not be computed again."""
    return not find_recipe(pack.recipe).needs_all_queries or keeps_all(pack, num_tokens)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the table, for prompts of `start` tokens or more of the model that is served."""

    start: int
    config: PolicyRow

    @property
    def recipe(self) -> Recipe:
        return find_recipe(self.config.recipe)


class Policy:
    """Reads the `kv` objects of requests, for one model and under one configuration."""

    def __init__(self, config: KVConfig, model: ModelSpec) -> None:
        """Raises ConfigError for a table, or a default recipe, that cannot be."""
        self._config, self._model = config, model
        self._unasked: dict[tuple[int, str, float], PackSpec] = {}
        _check_order(config.policy.rows)
        scale = min(1.0, model.max_context / config.policy.reference_context)
        self._rows = [_Row(ceil(row.min_tokens * scale), row) for row in config.policy.rows]
        for index, row in enumerate(config.policy.rows):
            self._check_row(f"kv.policy.rows[{index}]", row)
        self._check_default()

    def plan(self, options: Mapping[str, object], num_tokens: int, *, is_reasoning: bool = False) -> Plan:
        """What a request's `kv` object asks for a prompt of `num_tokens`; what it leaves open is the policy's, or the
        named recipe's own.

        Raises InvalidRequest with `param="kv.<option>"`, the value and the limit."""
        given = {key: value for key, value in options.items() if value is not None}
        name = given.get("recipe", self._config.recipe)
        if not isinstance(name, str) or name not in (AUTO, *RECIPES):
            known = ", ".join((AUTO, *RECIPES))
            raise InvalidRequest(f"kv.recipe: unknown recipe {name!r}; choose one of {known}", param="kv.recipe")
        if name == AUTO:
            given.pop("recipe", None)
            return self._choose(given, num_tokens, is_reasoning)
        pack = resolve(
            given,
            default_recipe=name,
            default_budget=self._config.budget,
            default_floor=self._config.floor,
        )
        check_model(pack, self._model)
        return Plan(Decision(pack))

    def starts(self) -> list[tuple[int, PolicyRow]]:
        """The table for this model: each row with the shortest prompt it is for."""
        return [(row.start, row.config) for row in self._rows]

    # ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, given: dict[str, object], num_tokens: int, is_reasoning: bool) -> Plan:
        _refuse_constants(given)
        says_how_much = bool({"budget", "ratio"} & given.keys())
        row = self._row(num_tokens, must_pack=says_how_much)
        least = self._config.policy.reasoning_ratio if is_reasoning and not says_how_much else 0.0
        pack = self._pack(row.config, row.config.recipe, given, least)
        usual = Decision(pack, "; ".join([self._length_reason(row, num_tokens), *_ratio_reason(row.config, least)]))
        plan = Plan(usual, max_protected=0 if "sinks" in given else _max_protected(pack, num_tokens))
        if row.config.on_hit is None or keeps_all(pack, num_tokens):
            return plan
        return self._with_hit(plan, self._pack(row.config, row.config.on_hit, given, least), num_tokens)

    def _row(self, num_tokens: int, *, must_pack: bool) -> _Row:
        """By length; but a request that says how much to keep is packed however short it is, by the first row that
        packs."""
        reached = [row for row in self._rows if num_tokens >= row.start][-1]
        if not must_pack or reached.recipe.has_budget:
            return reached
        return next((row for row in self._rows if row.recipe.has_budget and row.start > reached.start), reached)

    def _pack(self, row: PolicyRow, recipe: str, given: Mapping[str, object], least_ratio: float = 0.0) -> PackSpec:
        """The row's options, each replaced by the request's own where it has one."""
        if given:
            return self._made(row, recipe, given, least_ratio)
        # Most requests leave everything open: a handful of packings, which are made once.
        key = (row.min_tokens, recipe, least_ratio)
        pack = self._unasked.get(key)
        if pack is None:
            pack = self._unasked[key] = self._made(row, recipe, given, least_ratio)
        return pack

    def _made(self, row: PolicyRow, recipe: str, given: Mapping[str, object], least_ratio: float) -> PackSpec:
        options: dict[str, object] = {"window": row.window, "codec": row.codec}
        if not {"budget", "ratio"} & given.keys():
            options["ratio"] = _ratio(row, least_ratio)
        pack = resolve(
            {**options, **self._that_apply(recipe, given)},
            default_recipe=recipe,
            default_budget=None,
            default_floor=self._config.policy.floor,
        )
        check_model(pack, self._model)
        return pack

    def _that_apply(self, recipe: str, given: Mapping[str, object]) -> Mapping[str, object]:
        """Where every token is kept there is no window, and any floor holds. Such options are checked none the less:
        what is refused in one request must not be accepted in a shorter one."""
        moot = {key for key in ("window", "sinks", "floor") if key in given}
        packing = next((row.config for row in self._rows if row.recipe.drops_tokens), None)
        if not moot or find_recipe(recipe).drops_tokens or packing is None:
            return given
        self._pack(packing, packing.recipe, given)
        return {key: value for key, value in given.items() if key not in moot}

    def _with_hit(self, plan: Plan, pack: PackSpec, num_tokens: int) -> Plan:
        share, usual = self._config.policy.reuse_ratio, plan.usual
        why = f"{share:.0%} of it or more is cached, which {usual.pack.recipe} could not use"
        return replace(plan, on_hit=Decision(pack, f"{usual.reason}; {why}"), hit_tokens=ceil(share * num_tokens))

    def _length_reason(self, row: _Row, num_tokens: int) -> str:
        length = f"The prompt has {num_tokens} tokens"
        if num_tokens < row.start:
            return f"{length}, and the request says how much to keep"
        following = [other.start for other in self._rows if other.start > row.start]
        if row.recipe.has_budget or not following:
            return f"{length}, which is {row.start} or more"
        return f"{length}, and below {following[0]} nothing is dropped"

    # ── checking, once, at start ─────────────────────────────────────────────────────────────────────────────────

    def _check_row(self, where: str, row: PolicyRow) -> None:
        try:
            for recipe in (row.recipe, row.on_hit):
                if recipe is not None:
                    self._pack(row, recipe, {})
        except InvalidRequest as error:
            raise ConfigError(f"{where}: {error.message}") from None
        if row.on_hit is not None and not find_recipe(row.recipe).needs_all_queries:
            raise ConfigError(f"{where}.on_hit: recipe {row.recipe!r} uses what is cached; leave `on_hit` out")
        if row.on_hit is not None and find_recipe(row.on_hit).needs_all_queries:
            raise ConfigError(f"{where}.on_hit: recipe {row.on_hit!r} cannot use what is cached either")

    def _check_default(self) -> None:
        try:
            self.plan({}, 1)
        except InvalidRequest as error:
            raise ConfigError(error.message) from None


def _check_order(rows: tuple[PolicyRow, ...]) -> None:
    starts = [row.min_tokens for row in rows]
    if starts[0] != 0:
        raise ConfigError(f"kv.policy.rows[0].min_tokens: got {starts[0]}, the first row must start at 0")
    for index, (before, after) in enumerate(pairwise(starts), start=1):
        if after <= before:
            raise ConfigError(
                f"kv.policy.rows[{index}].min_tokens: got {after}, must be more than {before}, the row before"
            )


def _refuse_constants(given: Mapping[str, object]) -> None:
    """What belongs to one method means nothing before the method is chosen."""
    for key in given:
        if key not in AUTO_OPTIONS:
            problem = (
                f"recipe {AUTO!r} has no such option, only {', '.join(AUTO_OPTIONS)}; name the recipe it belongs to"
            )
            raise InvalidRequest(f"kv.{key}: {problem}", param=f"kv.{key}")


def _ratio(row: PolicyRow, least: float = 0.0) -> float | None:
    """None where there is nothing to divide, or where the recipe finds its own length."""
    recipe = find_recipe(row.recipe)
    own = recipe.ratio if row.ratio is None and recipe.has_budget else row.ratio
    return None if own is None else max(own, least)


def _ratio_reason(row: PolicyRow, least: float) -> list[str]:
    return [f"a request that reasons keeps {least:.0%} at least"] if _ratio(row, least) != _ratio(row) else []


def _max_protected(pack: PackSpec, num_tokens: int) -> int:
    """Half of the budget, as long as the window and a token chosen by score find room beside it."""
    if keeps_all(pack, num_tokens):
        return 0
    budget = base_budget(pack, num_tokens)
    return max(0, min(budget // 2, budget - pack.window - 1))


def _protecting(decision: Decision, num_tokens: int) -> Decision:
    pack = replace(decision.pack, sinks=max(decision.pack.sinks, num_tokens))
    return replace(decision, pack=pack, num_protected=num_tokens)
