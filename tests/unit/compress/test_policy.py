"""What `auto` chooses, and why: pure decisions over the table of the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.compress.budget import base_budget, keeps_all
from packlight.compress.policy import AUTO_OPTIONS, Policy
from packlight.compress.recipes import RECIPES
from packlight.core.config import KVConfig, PolicyConfig, PolicyRow
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import ModelSpec, PackSpec
from tests.support.router_harness import H2O_POLICY

MODEL = ModelSpec(
    name="m",
    fingerprint="m",
    num_layers=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=100,
    max_context=131_072,
    eos_token_ids=(0,),
    dtype="float32",
)
SMALL = replace(MODEL, max_context=8192)
LARGE = replace(MODEL, max_context=1 << 20)


def policy(model: ModelSpec = MODEL, **kv: Any) -> Policy:
    return Policy(build_config({"kv": kv}).kv, model)


def usual(num_tokens: int, options: dict[str, Any] | None = None, model: ModelSpec = MODEL, **kwargs: Any) -> PackSpec:
    return policy(model).plan(options or {}, num_tokens, **kwargs).usual.pack


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_tokens", "recipe", "ratio", "codec"),
    [
        (1, "none", None, "native"),
        (8191, "none", None, "native"),
        (8192, "snapkv", 0.5, "native"),
        (32_767, "snapkv", 0.5, "native"),
        (32_768, "snapkv", 0.25, "native"),
        (131_071, "snapkv", 0.25, "native"),
        (131_072, "snapkv", 0.25, "int8"),
        (900_000, "snapkv", 0.25, "int8"),
    ],
)
def test_a_prompt_s_length_chooses_its_row(num_tokens: int, recipe: str, ratio: float | None, codec: str) -> None:
    pack = usual(num_tokens, model=LARGE)
    assert (pack.recipe, pack.ratio, pack.codec) == (recipe, ratio, codec)
    assert pack.mass_floor == (0.0 if recipe == "none" else 0.8)
    assert pack.window == (64 if num_tokens >= 32_768 else 32)


@pytest.mark.parametrize(
    ("max_context", "starts"),
    [
        (2048, [0, 128, 512, 2048]),
        (8192, [0, 512, 2048, 8192]),
        (100_000, [0, 6250, 25_000, 100_000]),
        (131_072, [0, 8192, 32_768, 131_072]),
        (1 << 20, [0, 8192, 32_768, 131_072]),
    ],
)
def test_the_table_shrinks_with_the_model_s_context_and_never_grows(max_context: int, starts: list[int]) -> None:
    assert [start for start, _ in policy(replace(MODEL, max_context=max_context)).starts()] == starts


@pytest.mark.parametrize(("num_tokens", "recipe"), [(511, "none"), (512, "snapkv"), (2048, "snapkv")])
def test_a_small_model_is_packed_too(num_tokens: int, recipe: str) -> None:
    assert usual(num_tokens, model=SMALL).recipe == recipe


def test_operators_replace_the_table() -> None:
    rows = [{"min_tokens": 0, "recipe": "none"}, {"min_tokens": 100, "recipe": "quest", "ratio": 0.1, "codec": "fp8"}]
    plan = policy(policy={"rows": rows, "reference_context": 100, "floor": 0.5}).plan({}, 100)
    assert (plan.usual.pack.recipe, plan.usual.pack.ratio, plan.usual.pack.codec) == ("quest", 0.1, "fp8")
    assert plan.usual.pack.mass_floor == 0.0, "quest keeps everything"
    assert plan.max_protected == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["kv.policy.rows"]),
        ([{"min_tokens": 5, "recipe": "none"}], ["kv.policy.rows[0].min_tokens", "5", "start at 0"]),
        (
            [
                {"min_tokens": 0, "recipe": "none"},
                {"min_tokens": 9, "recipe": "h2o"},
                {"min_tokens": 9, "recipe": "mass"},
            ],
            ["kv.policy.rows[2].min_tokens", "got 9", "more than 9"],
        ),
        ([{"min_tokens": 0, "recipe": "zip"}], ["kv.policy.rows[0]", "'zip'", "snapkv"]),
        ([{"min_tokens": 0, "recipe": "auto"}], ["kv.policy.rows[0]", "'auto'"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "ratio": 1.5}], ["kv.policy.rows.0.ratio", "1.5"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "ratio": 0}], ["kv.policy.rows.0.ratio", "0"]),
        ([{"min_tokens": 0, "recipe": "none", "ratio": 0.5}], ["kv.policy.rows[0]", "keeps every token"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "codec": "mp3"}], ["kv.policy.rows[0]", "'mp3'", "int8"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "window": 5000}], ["kv.policy.rows[0]", "5000", "1024"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "widow": 5}], ["kv.policy.rows.0.widow", "no such setting"]),
        ([{"min_tokens": 0, "recipe": "h2o", "on_hit": "zip"}], ["kv.policy.rows[0]", "'zip'"]),
        ([{"min_tokens": 0, "recipe": "h2o", "on_hit": "h2o_pyramid"}], ["rows[0].on_hit", "h2o_pyramid"]),
        ([{"min_tokens": 0, "recipe": "snapkv", "on_hit": "mass"}], ["rows[0].on_hit", "uses what is cached"]),
    ],
)
def test_a_table_that_cannot_be_is_refused_at_start(rows: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        policy(policy={"rows": rows})
    assert all(word in refused.value.message for word in words), refused.value.message


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ({"recipe": "zip"}, ["'zip'", "auto", "snapkv"]),
        ({"recipe": "snapkv", "budget": 5}, ["5 (the default)", "37"]),
        ({"recipe": "snapkv", "budget": 200_000}, ["200000", "131072"]),
        ({"floor": 1}, ["kv.floor", "1"]),
        ({"policy": {"reuse_ratio": 0}}, ["kv.policy.reuse_ratio", "0"]),
        ({"policy": {"reasoning_ratio": 2}}, ["kv.policy.reasoning_ratio", "2"]),
    ],
)
def test_defaults_that_cannot_be_are_refused_at_start(kv: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        policy(**kv)
    assert all(word in refused.value.message for word in words), refused.value.message


def test_a_row_that_the_model_cannot_have_is_refused_at_start() -> None:
    rows = [PolicyRow(min_tokens=0, recipe="adakv")]
    Policy(KVConfig(policy=PolicyConfig(rows=tuple(rows))), MODEL)
    with pytest.raises(ConfigError, match=r"kv\.policy\.rows\[0\].*adakv"):
        Policy(KVConfig(policy=PolicyConfig(rows=tuple(rows))), replace(MODEL, num_kv_heads=1))


@pytest.mark.parametrize(
    ("kv", "problem"),
    [({"recipe": "snap"}, "unknown recipe 'snap'"), ({"recipe": "snapkv", "budget": 10}, "must be at least 37")],
)
def test_the_fleet_s_defaults_are_checked_at_start(kv: dict[str, Any], problem: str) -> None:
    policy(recipe="none")
    policy(recipe="snapkv", budget=64)
    with pytest.raises(ConfigError, match=problem):
        policy(**kv)


# ── a prefix that is cached ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_tokens", "num_cached", "recipe"),
    [
        (10_000, 0, "h2o_pyramid"),
        (10_000, 2499, "h2o_pyramid"),
        (10_000, 2500, "pyramidkv"),
        (10_001, 2500, "h2o_pyramid"),
        (10_000, 10_000, "pyramidkv"),
        (8191, 8191, "none"),
        (40_000, 40_000, "snapkv"),
    ],
)
def test_a_good_hit_is_used_rather_than_recomputed(num_tokens: int, num_cached: int, recipe: str) -> None:
    assert policy(policy=H2O_POLICY).plan({}, num_tokens).decide(num_cached).pack.recipe == recipe


def test_what_is_asked_holds_on_a_hit_too() -> None:
    options = {"budget": 512, "codec": "fp8", "floor": 0.5, "sinks": 8, "window": 48}
    plan = policy(policy=H2O_POLICY).plan(options, 10_000)
    assert plan.on_hit is not None
    assert replace(plan.on_hit.pack, recipe="") == replace(plan.usual.pack, recipe="")
    assert plan.on_hit.reason.startswith(plan.usual.reason)
    assert "cached, which h2o_pyramid could not use" in plan.on_hit.reason


def test_only_a_recipe_that_looks_at_all_queries_is_indifferent_to_the_cache() -> None:
    auto = policy(policy=H2O_POLICY)
    assert auto.plan({}, 10_000).looks_at_cache(10_000)
    assert auto.plan({"recipe": "snapkv"}, 10_000).looks_at_cache(10_000)
    assert not auto.plan({"recipe": "h2o"}, 10_000).looks_at_cache(10_000)
    assert auto.plan({"recipe": "h2o", "ratio": 1.0}, 10_000).looks_at_cache(10_000), "everything is kept unseen"


# ── what a request may say beside `auto` ─────────────────────────────────────────────────────────────────────────────


def test_an_option_wins_over_the_row() -> None:
    options = {"ratio": 0.1, "codec": "fp8", "floor": 0.9, "window": 100, "sinks": 0}
    pack = usual(40_000, options)
    assert (pack.recipe, pack.ratio, pack.budget_tokens) == ("snapkv", 0.1, None)
    assert (pack.codec, pack.mass_floor, pack.window, pack.sinks) == ("fp8", 0.9, 100, 0)
    pack = usual(40_000, {"recipe": "auto", "budget": 700})
    assert (pack.ratio, pack.budget_tokens) == (None, 700)


@pytest.mark.parametrize("num_tokens", [10, 8191, 10_000])
def test_a_request_that_says_how_much_is_packed_however_short(num_tokens: int) -> None:
    plan = policy().plan({"ratio": 0.2}, num_tokens)
    assert (plan.usual.pack.recipe, plan.usual.pack.ratio) == ("snapkv", 0.2)
    assert ("the request says how much to keep" in plan.usual.reason) == (num_tokens < 8192)


@pytest.mark.parametrize("options", [{"floor": 0.9}, {"window": 64}, {"sinks": 8}])
def test_options_without_effect_on_a_short_prompt_are_accepted_there(options: dict[str, Any]) -> None:
    assert usual(10, options) == PackSpec(codec="native")


BAD: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"recipe": "zip"}, "recipe", ["'zip'", *RECIPES, "auto"]),
    ({"recipe": 3}, "recipe", ["3", "auto"]),
    ({"ratio": 0}, "ratio", ["0", "above 0"]),
    ({"ratio": 1.01}, "ratio", ["1.01"]),
    ({"budget": -1}, "budget", ["-1"]),
    ({"budget": 131_073}, "budget", ["131073", "131072"]),
    ({"budget": 20}, "budget", ["20", "at least"]),
    ({"budget": 200, "ratio": 0.5}, "ratio", ["one of them"]),
    ({"codec": "mp3"}, "codec", ["'mp3'", "int8"]),
    ({"floor": 1}, "floor", ["1"]),
    ({"window": 0}, "window", ["0", "1024"]),
    ({"sinks": 257}, "sinks", ["257", "256"]),
    ({"kernel": 15}, "kernel", list(AUTO_OPTIONS)),
    ({"beta": 10}, "beta", list(AUTO_OPTIONS)),
    ({"speed": 1}, "speed", list(AUTO_OPTIONS)),
]


@pytest.mark.parametrize(("options", "param", "words"), BAD, ids=str)
@pytest.mark.parametrize("num_tokens", [10, 10_000, 40_000])
def test_what_is_refused_does_not_depend_on_the_length(
    num_tokens: int, options: dict[str, Any], param: str, words: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        policy().plan(options, num_tokens)
    assert refused.value.param == f"kv.{param}"
    assert all(word in refused.value.message for word in words), refused.value.message


def test_a_named_recipe_has_its_own_defaults_and_no_reasons() -> None:
    plan = policy(floor=0.3).plan({"recipe": "snapkv"}, 40_000, is_reasoning=True)
    assert plan.usual.pack == PackSpec("snapkv", ratio=0.25, codec="native", mass_floor=0.3)
    assert (plan.usual.is_auto, plan.on_hit, plan.max_protected) == (False, None, 0)
    assert policy(recipe="none").plan({}, 40_000).usual.pack == PackSpec(codec="native")
    assert policy(recipe="snapkv", budget=99).plan({}, 40_000).usual.pack.budget_tokens == 99
    assert policy(recipe="snapkv", budget=99).plan({"recipe": "auto"}, 40_000).usual.pack.ratio == 0.25


# ── reasoning ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("num_tokens", "ratio"), [(100, None), (10_000, 0.5), (40_000, 0.3), (200_000, 0.3)])
def test_reasoning_keeps_at_least_its_share(num_tokens: int, ratio: float | None) -> None:
    plan = policy(LARGE).plan({}, num_tokens, is_reasoning=True)
    assert plan.usual.pack.ratio == ratio
    assert ("a request that reasons keeps 30% at least" in plan.usual.reason) == (ratio == 0.3)


def test_reasoning_does_not_overrule_the_request() -> None:
    assert usual(40_000, {"ratio": 0.1}, is_reasoning=True).ratio == 0.1
    assert usual(40_000, {"budget": 999}, is_reasoning=True).budget_tokens == 999


def test_reasoning_holds_on_a_hit() -> None:
    rows = [{"min_tokens": 0, "recipe": "h2o", "ratio": 0.1, "on_hit": "snapkv"}]
    plan = policy(policy={"rows": rows}).plan({}, 10_000, is_reasoning=True)
    assert [plan.decide(cached).pack.ratio for cached in (0, 10_000)] == [0.3, 0.3]


# ── protection ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_protected_beginning_is_kept_as_sinks_are() -> None:
    plan = policy(policy=H2O_POLICY).plan({}, 10_000)
    assert plan.max_protected == 2500
    kept = plan.protecting(2500)
    for decision in (kept.usual, kept.on_hit):
        assert decision is not None
        assert (decision.pack.sinks, decision.num_protected) == (2500, 2500)
    assert plan.protecting(2501) == plan.protecting(0) == plan
    assert plan.protecting(3).usual.pack.sinks == 4


def test_sinks_that_are_asked_for_are_not_raised() -> None:
    assert policy().plan({"sinks": 8}, 10_000).max_protected == 0


def test_nothing_is_protected_where_nothing_is_dropped() -> None:
    assert policy().plan({}, 8191).max_protected == 0
    assert policy().plan({"ratio": 1.0}, 10_000).max_protected == 0


@given(
    num_tokens=st.integers(1, 300_000),
    ratio=st.none() | st.floats(0.001, 1.0),
    window=st.none() | st.integers(1, 1024),
    is_reasoning=st.booleans(),
)
def test_protection_leaves_room_for_window_and_choice(
    num_tokens: int, ratio: float | None, window: int | None, is_reasoning: bool
) -> None:
    plan = policy(LARGE).plan({"ratio": ratio, "window": window}, num_tokens, is_reasoning=is_reasoning)
    before = base_budget(plan.usual.pack, num_tokens)
    pack = plan.protecting(plan.max_protected).usual.pack
    assert base_budget(pack, num_tokens) == before, "protection takes from the budget and does not add to it"
    assert plan.max_protected <= before // 2
    if plan.max_protected:
        assert not keeps_all(pack, num_tokens)
        assert pack.sinks + pack.window + 1 <= before
