"""The `kv` object over HTTP: what is decided, what the backend is told, what the answer says, what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.compress.parts import CODECS
from packlight.compress.policy import Plan
from packlight.compress.recipes import RECIPES
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError
from packlight.core.types import GenerateRequest
from packlight.models.fake_spec import FakeTokenizer, fake_spec
from packlight.router.app import build_app
from packlight.router.service import BackendEvent, Decided, ServedModel
from packlight.telemetry.metrics import RouterMetrics
from tests.support.fleet_of_fakes import fleet_of_fakes
from tests.support.router_harness import CHAT, COMPLETIONS, H2O_POLICY, MODEL, Harness, events_of
from tests.support.scripted_backend import ScriptedBackend, Step, one_by_one

ANSWER = one_by_one([80])
CONTEXT = 8192  # so rows start at 512, 2048 and 8192 tokens


class PlacingBackend(ScriptedBackend):
    """Decides as the pipeline does, at a place that has `num_cached` tokens of every prompt."""

    def __init__(self, script: Sequence[Step], num_cached: int) -> None:
        super().__init__(script)
        self.num_cached = num_cached

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[BackendEvent, None]:
        assert plan is not None
        decision = plan.decide(self.num_cached)
        yield Decided(request.request_id, decision)
        async for event in super().generate(replace(request, pack=decision.pack)):
            yield event


def harness_of(num_cached: int = 0, **kwargs: Any) -> Harness:
    harness = Harness(ANSWER, kwargs.pop("max_context", CONTEXT), **kwargs)
    harness.use_backend(PlacingBackend(ANSWER, num_cached))
    return harness


async def kv_of(harness: Harness, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    response = await harness.post(path, {"model": MODEL, "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    report: dict[str, Any] = response.json()["usage"]["kv"]
    return report


def prompt_of(num_tokens: int) -> list[int]:
    return [70 + index % 100 for index in range(num_tokens)]


# ── what is decided ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_tokens", "num_cached", "recipe", "ratio", "reason"),
    [
        (511, 0, "none", None, "The prompt has 511 tokens, and below 512 nothing is dropped"),
        (512, 0, "snapkv", 0.5, "The prompt has 512 tokens, which is 512 or more"),
        (512, 512, "snapkv", 0.5, "The prompt has 512 tokens, which is 512 or more"),
        (2048, 2048, "snapkv", 0.25, "The prompt has 2048 tokens, which is 2048 or more"),
    ],
)
async def test_auto_is_the_default_and_says_why(
    num_tokens: int, num_cached: int, recipe: str, ratio: float | None, reason: str
) -> None:
    harness = harness_of(num_cached)
    kv = await kv_of(harness, prompt=prompt_of(num_tokens))
    (request,) = harness.backend.requests
    assert (request.pack.recipe, request.pack.ratio) == (recipe, ratio)
    assert (kv["policy"], kv["reason"], kv["ratio"], kv["budget"]) == ("auto", reason, ratio, None)
    assert kv["floor"] == (0.0 if recipe == "none" else 0.8)
    assert harness.metric("auto_recipes_total", recipe=recipe) == 1


async def test_a_table_may_say_what_to_do_on_a_hit() -> None:
    for num_cached, recipe in ((127, "h2o_pyramid"), (128, "pyramidkv")):
        kv = await kv_of(harness_of(num_cached, kv={"policy": H2O_POLICY}), prompt=prompt_of(512))
        reason = "; 25% of it or more is cached, which h2o_pyramid could not use" if num_cached == 128 else ""
        assert kv["reason"] == f"The prompt has 512 tokens, which is 512 or more{reason}"
        assert kv["policy"] == "auto", recipe


async def test_the_report_has_these_names() -> None:
    kv = await kv_of(harness_of(), prompt=prompt_of(600))
    assert [*kv] == [
        *("policy", "reason", "protected_tokens", "recipe", "codec", "budget", "ratio", "floor", "prompt_tokens"),
        *("kept_tokens", "grown_tokens", "read_tokens", "shipped_bytes", "exact_bytes", "attention_mass_retained"),
        "timings_ms",
    ]
    named = await kv_of(harness_of(), prompt=prompt_of(600), kv={"recipe": "snapkv"})
    assert [*named] == [*kv][3:]


async def test_what_the_floor_did_is_counted() -> None:
    harness = harness_of()
    kv = await kv_of(harness, prompt=prompt_of(600))
    assert kv["grown_tokens"] == 2.5
    assert harness.metric("grown_tokens_sum", recipe="snapkv") == 2.5, "of the recipe that the worker reports"


async def test_a_named_recipe_is_not_the_policy_s() -> None:
    harness = harness_of()
    for options in ({"recipe": "none"}, {"recipe": "mass", "floor": 0.7, "codec": "fp8"}):
        kv = await kv_of(harness, prompt=prompt_of(600), kv=options)
        assert "policy" not in kv
        assert kv["floor"] == options.get("floor", 0.0)
    assert [request.pack.recipe for request in harness.backend.requests] == ["none", "mass"]
    assert not any(harness.metric("auto_recipes_total", recipe=recipe) for recipe in RECIPES)


async def test_a_stream_s_last_usage_says_the_same() -> None:
    body = {"model": MODEL, "prompt": prompt_of(600), "kv": {"recipe": "auto", "budget": 300}}
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    report = events_of(await harness_of().post(COMPLETIONS, streamed))[-2]["usage"]["kv"]
    whole = (await harness_of().post(COMPLETIONS, body)).json()["usage"]["kv"]
    assert report.pop("timings_ms").keys() == whole.pop("timings_ms").keys()
    assert report == whole
    assert (whole["budget"], whole["ratio"]) == (300, None)


async def test_prompts_of_one_request_are_decided_one_by_one() -> None:
    harness = harness_of()
    kv = await kv_of(harness, prompt=[prompt_of(100), prompt_of(600)], n=2)
    requests = sorted(harness.backend.requests, key=lambda request: int(request.request_id.rpartition("-")[2]))
    assert [request.pack.recipe for request in requests] == ["none", "none", "snapkv", "snapkv"]
    assert kv["reason"].count("The prompt has") == 2
    assert (kv["ratio"], kv["floor"]) == (None, None), "they differ"
    assert (kv["kept_tokens"], kv["read_tokens"], kv["grown_tokens"]) == (25.0, 12.5, 5.0)


async def test_operators_choose_the_default_and_the_table() -> None:
    assert "policy" not in await kv_of(harness_of(kv={"recipe": "none"}), prompt=prompt_of(600))
    harness = harness_of(kv={"recipe": "snapkv", "budget": 99, "floor": 0.5})
    kv = await kv_of(harness, prompt=prompt_of(600))
    assert (kv["budget"], kv["floor"]) == (99, 0.5)
    rows = [{"min_tokens": 0, "recipe": "none"}, {"min_tokens": 160, "recipe": "mass", "ratio": 0.9}]
    harness = harness_of(kv={"policy": {"rows": rows}})
    assert (await kv_of(harness, prompt=prompt_of(10)))["ratio"] == 0.9
    with pytest.raises(ConfigError, match=r"kv\.policy\.rows\[0\]"):
        Harness(kv={"policy": {"rows": [{"min_tokens": 0, "recipe": "zip"}]}})


# ── reasoning ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "ratio"),
    [
        ({}, 0.25),
        ({"reasoning_effort": "high"}, 0.3),
        ({"reasoning_effort": "none"}, 0.25),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 0.3),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, 0.25),
        ({"reasoning_effort": "high", "kv": {"ratio": 0.1}}, 0.1),
    ],
)
async def test_a_request_that_reasons_keeps_more(fields: dict[str, Any], ratio: float) -> None:
    messages = [{"role": "user", "content": "one, two, three " * 600}]
    kv = await kv_of(harness_of(), CHAT, messages=messages, **fields)
    assert kv["ratio"] == ratio
    assert ("a request that reasons keeps 30% at least" in kv["reason"]) == (ratio == 0.3)


async def test_effort_is_a_hint_without_a_chat_and_a_string_with_one() -> None:
    kv = await kv_of(harness_of(), prompt=prompt_of(2100), reasoning_effort="high")
    assert kv["ratio"] == 0.25
    response = await Harness().chat(reasoning_effort=5)
    assert response.json()["error"]["param"] == "reasoning_effort"


# ── protection ───────────────────────────────────────────────────────────────────────────────────────────────────────

SHOTS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "uno"}]
DOCUMENT = {"role": "user", "content": "one, two, three " * 200}


@pytest.mark.parametrize("num_cached", [0, 10_000])
async def test_the_system_prompt_and_the_shots_are_kept(num_cached: int) -> None:
    harness = harness_of(num_cached, kv={"policy": H2O_POLICY})
    kv = await kv_of(harness, CHAT, messages=[{"role": "developer", "content": "Be brief."}, *SHOTS, DOCUMENT])
    (request,) = harness.backend.requests
    shown = harness.model.tokenizer.text(request.token_ids[: request.pack.sinks])
    assert shown == "system\nBe brief.\nuser\none\nassistant\nuno\nuser\n"
    assert kv["protected_tokens"] == request.pack.sinks > 10
    assert request.pack.recipe == ("pyramidkv" if num_cached else "h2o_pyramid")


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([DOCUMENT], {}),
        ([{"role": "system", "content": "Be brief. " * 400}, DOCUMENT], {}),
        ([{"role": "system", "content": "Be brief."}, DOCUMENT], {"kv": {"recipe": "snapkv"}}),
        ([{"role": "system", "content": "Be brief."}, DOCUMENT], {"kv": {"sinks": 4}}),
    ],
    ids=["nothing to protect", "more than half of the budget", "a named recipe", "sinks asked for"],
)
async def test_no_more_than_the_sinks_are_kept(messages: list[dict[str, str]], fields: dict[str, Any]) -> None:
    harness = harness_of()
    kv = await kv_of(harness, CHAT, messages=messages, **fields)
    assert harness.backend.requests[0].pack.sinks == 4
    assert kv.get("protected_tokens", 0) == 0


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

ALL = (*RECIPES, "auto")
BAD_OPTIONS: list[tuple[dict[str, Any], str, Sequence[str]]] = [
    ({"recipe": "zip"}, "kv.recipe", ALL),
    ({"recipe": 3}, "kv.recipe", ALL),
    ({"recipe": "snapkv", "budget": -5}, "kv.budget", ("-5", "1")),
    ({"recipe": "snapkv", "budget": 0}, "kv.budget", ("0", "1")),
    ({"recipe": "snapkv", "budget": CONTEXT + 1}, "kv.budget", (str(CONTEXT + 1), str(CONTEXT))),
    ({"recipe": "snapkv", "budget": 2**40}, "kv.budget", (str(2**40),)),
    ({"recipe": "snapkv", "budget": 36}, "kv.budget", ("36", "37")),
    ({"budget": -5}, "kv.budget", ("-5", "1")),
    ({"recipe": "snapkv", "ratio": 0}, "kv.ratio", ("0", "at most 1")),
    ({"recipe": "snapkv", "ratio": 1.5}, "kv.ratio", ("1.5", "at most 1")),
    ({"recipe": "snapkv", "ratio": -0.1}, "kv.ratio", ("-0.1", "at most 1")),
    ({"ratio": 7}, "kv.ratio", ("7", "at most 1")),
    ({"recipe": "snapkv", "ratio": 0.5, "budget": 99}, "kv.ratio", ("one of them",)),
    ({"recipe": "snapkv", "codec": "zip"}, "kv.codec", tuple(CODECS)),
    ({"codec": "zip"}, "kv.codec", tuple(CODECS)),
    ({"recipe": "none", "ratio": 0.5}, "kv.ratio", ("'none'", "keeps every token")),
    ({"recipe": "quest", "floor": 0.5}, "kv.floor", ("'quest'", "keeps every token")),
    ({"recipe": "snapkv", "floor": 1}, "kv.floor", ("1",)),
    ({"recipe": "snapkv", "alpha": 0.5}, "kv.alpha", ("'snapkv'", "pooling")),
    ({"recipe": "adakv", "alpha": 2}, "kv.alpha", ("2", "0 to 1")),
    ({"alpha": 0.5}, "kv.alpha", ("'auto'", "floor")),
]


@pytest.mark.parametrize(("options", "param", "words"), BAD_OPTIONS, ids=str)
async def test_bad_options_get_a_400_with_what_is_allowed(
    options: dict[str, Any], param: str, words: Sequence[str]
) -> None:
    harness = harness_of()
    for path, prompt in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": [DOCUMENT]})):
        response = await harness.post(path, {"model": MODEL, "kv": options, **prompt})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert all(word in error["message"] for word in words), error["message"]
    assert harness.backend.requests == []


@pytest.mark.parametrize(
    ("options", "model", "param", "words"),
    [
        ({"recipe": "adakv"}, {"num_kv_heads": 1}, "kv.recipe", ("'adakv'", MODEL, "snapkv")),
        ({"recipe": "snapkv", "codec": "turboquant4"}, {"head_dim": 96}, "kv.codec", ("turboquant4", "96", "int4")),
        ({"codec": "turboquant4"}, {"head_dim": 96}, "kv.codec", ("turboquant4", "96", "int4")),
    ],
    ids=["heads that compete, and one head", "a rotation that the head has no room for", "the same under auto"],
)
async def test_what_the_model_cannot_have_is_refused_by_name(
    options: dict[str, Any], model: dict[str, Any], param: str, words: Sequence[str]
) -> None:
    assert (await kv_of(harness_of(), prompt=prompt_of(9), kv=options))["recipe"]
    response = await harness_of(model=model).post(COMPLETIONS, {"model": MODEL, "prompt": "x", "kv": options})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert all(word in error["message"] for word in words), error["message"]


# ── the whole way, through real workers around the arithmetic model ──────────────────────────────────────────────────


async def test_two_turns_through_real_workers() -> None:
    """1024 tokens of context, so prompts of 64 tokens or more are packed; a byte is a token."""
    async with fleet_of_fakes(num_prefill=1) as fleet:
        model, metrics = ServedModel(fake_spec(max_context=1024), FakeTokenizer()), RouterMetrics(CollectorRegistry())
        config = build_config({"kv": {"policy": H2O_POLICY}})
        app = build_app(config, model, fleet.pipeline, metrics)
        document = {"role": "user", "content": "Read this: " + "sense and nonsense, " * 6}
        first = [{"role": "system", "content": "You are brief. "}, document]
        usage = await ask_app(app, first)
        kv, num_prompt = usage["kv"], usage["prompt_tokens"]
        assert (kv["policy"], kv["recipe"], kv["protected_tokens"]) == ("auto", "h2o_pyramid", 15)
        assert kv["kept_tokens"] == kv["read_tokens"] == -(-num_prompt // 2) + kv["grown_tokens"]
        assert kv["shipped_bytes"] < kv["exact_bytes"]
        assert kv["attention_mass_retained"] >= 0.8
        assert kv["grown_tokens"] > 0, "the model attends to all tokens alike, so half of them have half of the mass"
        await fleet.until_indexed(list((first[0]["content"] + document["content"]).encode()), "prefill-0")
        second = [*first, {"role": "assistant", "content": "Read."}, {"role": "user", "content": "What was it?"}]
        usage = await ask_app(app, second)
        assert (usage["kv"]["recipe"], usage["kv"]["reason"].count("cached")) == ("pyramidkv", 1)
        assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2
        short = await ask_app(app, [{"role": "user", "content": "Hello"}])
        assert (short["kv"]["recipe"], short["kv"]["kept_tokens"]) == ("none", 5)


async def ask_app(app: FastAPI, messages: list[dict[str, str]]) -> dict[str, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
        response = await client.post(CHAT, json={"model": "fake", "messages": messages, "max_tokens": 8})
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage
