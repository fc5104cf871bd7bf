"""Whole answers: what reaches the backend, and what comes back."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from packlight.core.types import FinishReason, PackSpec, SamplingParams, StopRules
from packlight.router.params import derive_seed
from tests.support.router_harness import CHAT, COMPLETIONS, MODEL, Harness, chat_body
from tests.support.scripted_backend import KV, NUM_CACHED, End, Say, one_by_one
from tests.support.tiny_tokenizer import EOS_ID, TinyTokenizer, tiny_tokenizer

ENCODE = tiny_tokenizer().encode


async def test_a_chat_completion_has_every_field_of_openais_schema() -> None:
    ids = ENCODE("Hello world")
    harness = Harness(one_by_one([*ids, EOS_ID]))
    response = await harness.chat("two words", kv={"recipe": "snapkv", "codec": "int8", "floor": 0.5})
    body = response.json()
    num_prompt = len(harness.backend.requests[0].token_ids)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("fp_")
    assert abs(body["created"] - time.time()) < 60
    assert {**body, "id": 0, "created": 0, "system_fingerprint": 0, "usage": 0} == {
        "id": 0,
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": 0,
        "service_tier": "default",
        "system_fingerprint": 0,
    }
    timings = body["usage"]["kv"].pop("timings_ms")
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(ids) + 1,
        "total_tokens": num_prompt + len(ids) + 1,
        "prompt_tokens_details": {"cached_tokens": NUM_CACHED},
        "kv": {
            "recipe": "snapkv",
            "codec": "int8",
            "budget": None,
            "ratio": 0.25,
            "floor": 0.5,
            "prompt_tokens": num_prompt,
            "kept_tokens": 12.5,
            "grown_tokens": 2.5,
            "read_tokens": 6.25,
            "shipped_bytes": 1000,
            "exact_bytes": 8000,
            "attention_mass_retained": 0.97,
        },
    }
    assert timings.pop("prepare") > 0
    assert timings == {
        "decode_queue": 1.0,
        "prefill_queue": 2.0,
        "prefill": 30.0,
        "select": 4.0,
        "transfer": 5.0,
        "first_step": 0.0,
    }
    ChatCompletion.model_validate(body, strict=True)


async def test_the_backend_gets_the_whole_request() -> None:
    harness = Harness(one_by_one([80]))
    await harness.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"7": -100, "5": 2.5},
        seed=-5,
        logprobs=True,
        top_logprobs=4,
        max_completion_tokens=7,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[70, 71],
        cache_salt="tenant-1",
        kv={"recipe": "snapkv", "budget": 64, "window": 8, "sinks": 2, "kernel": 15},
    )
    (request,) = harness.backend.requests
    prompt = tiny_tokenizer().apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert request.token_ids == tuple(prompt)
    assert request.num_prompt_tokens == len(prompt)
    assert request.sampling == SamplingParams(0.5, 0.9, 40, 0.05, 1.1, -1.0, 1.5, ((5, 2.5), (7, -100.0)), -5, 4)
    assert request.stop == StopRules(7, (EOS_ID,), (70, 71), ignore_eos=True, min_tokens=2)
    assert request.pack == PackSpec("snapkv", 64, None, 8, 2, 15, codec="native")
    assert request.cache_salt == "tenant-1"
    assert request.request_id.endswith("-0")
    assert 590 < request.deadline_s <= 600


async def test_without_limits_the_answer_may_fill_the_context() -> None:
    harness = Harness(one_by_one([80]), max_context=200, kv={"recipe": "none"})
    await harness.chat(top_k=-1)
    (request,) = harness.backend.requests
    assert request.stop.max_tokens == 200 - request.num_prompt_tokens
    assert request.sampling == SamplingParams(seed=request.sampling.seed)
    assert request.pack == PackSpec(codec="native")


async def test_choices_have_their_own_seeds_and_ids() -> None:
    harness = Harness(lambda request: one_by_one(ENCODE(request.request_id[-1])))
    body = (await harness.chat(n=4, seed=11)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["0", "1", "2", "3"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    requests = sorted(harness.backend.requests, key=lambda request: request.request_id)
    assert [request.request_id for request in requests] == [f"{body['id']}-{i}" for i in range(4)]
    assert [request.sampling.seed for request in requests] == [derive_seed(11, i) for i in range(4)]
    assert len({request.sampling.seed for request in requests}) == 4
    assert requests[0].sampling.seed == 11
    assert body["usage"]["prompt_tokens"] == requests[0].num_prompt_tokens
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == NUM_CACHED
    assert body["usage"]["kv"]["shipped_bytes"] == 4000


async def test_without_a_seed_each_request_draws_one() -> None:
    harness = Harness(one_by_one([80]))
    for _ in range(3):
        await harness.chat()
    assert len({request.sampling.seed for request in harness.backend.requests}) == 3


@pytest.mark.parametrize(
    ("messages", "as_seen"),
    [
        ([{"role": "developer", "content": "be brief"}], [{"role": "system", "content": "be brief"}]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}],
            [{"role": "user", "content": "a\nb"}],
        ),
        ([{"role": "user", "content": "a", "extra": {"x": 1}}], [{"role": "user", "content": "a"}]),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [{"role": "assistant", "content": "no"}],
        ),
    ],
)
async def test_messages_reach_the_template(messages: list[dict[str, Any]], as_seen: list[dict[str, Any]]) -> None:
    harness = Harness(one_by_one([80]))
    await harness.post(CHAT, chat_body() | {"messages": messages})
    prompt = tiny_tokenizer().apply_chat_template(as_seen, add_generation_prompt=True)
    assert harness.backend.requests[0].token_ids == tuple(prompt)


async def test_template_options_reach_the_template() -> None:
    harness = Harness(one_by_one([80]))
    await harness.chat(chat_template_kwargs={"enable_thinking": True, "reasoning_effort": None})
    assert tiny_tokenizer().text(harness.backend.requests[0].token_ids).endswith("<think>assistant\n")


async def test_the_effort_reaches_the_template_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    original = TinyTokenizer.apply_chat_template

    def listen(self: TinyTokenizer, messages: Any, **options: Any) -> list[int]:
        told.append(options.get("reasoning_effort"))
        return original(self, messages, **options)

    harness = Harness(one_by_one([80]))
    monkeypatch.setattr(TinyTokenizer, "apply_chat_template", listen)
    await harness.chat(reasoning_effort="low")
    await harness.chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    await harness.chat()
    assert list(dict.fromkeys(told)) == ["low", "high", None]


async def test_an_explicit_cache_policy_shares_with_nobody() -> None:
    harness = Harness(one_by_one([80]))
    for _ in range(2):
        await harness.chat(prompt_cache_options={"mode": "explicit"}, cache_salt="tenant-1")
    salts = {request.cache_salt for request in harness.backend.requests}
    assert len(salts) == 2
    assert "tenant-1" not in salts


async def test_logprobs_have_true_bytes_and_finite_values() -> None:
    ids = ENCODE("é🎉")

    def script(request: Any) -> Any:
        return one_by_one([*ids, EOS_ID])

    harness = Harness(script)
    content = (await harness.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    assert content["refusal"] is None
    assert b"".join(bytes(entry["bytes"]) for entry in content["content"]) == "é🎉".encode()
    assert content["content"][0]["token"] == "\ufffd"
    for entry in content["content"]:
        assert entry["logprob"] == -0.25
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -1.25]


async def test_zero_top_logprobs_and_minus_infinity() -> None:
    harness = Harness([Say([80]), End()])
    original = harness.backend._token
    harness.backend._token = lambda *args: replace(original(*args), logprob=float("-inf"))  # type: ignore[method-assign]
    body = (await harness.chat(logprobs=True)).json()
    (entry,) = body["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []
    assert entry["logprob"] == -9999.0
    ChatCompletion.model_validate(body, strict=True)


async def test_a_stop_string_closes_the_backend() -> None:
    ids = ENCODE("one, two, three")
    harness = Harness(one_by_one(ids, FinishReason.LENGTH))
    body = (await harness.chat(stop=[" tw", "never"])).json()
    (request,) = harness.backend.requests
    assert body["choices"][0]["message"]["content"] == "one,"
    assert body["choices"][0]["finish_reason"] == "stop"
    upto = next(n for n in range(len(ids)) if " tw" in tiny_tokenizer().text(ids[:n]))
    assert body["usage"]["completion_tokens"] == upto < len(ids)
    assert body["usage"]["kv"]["recipe"] == KV.recipe
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED}
    assert harness.backend.num_steps[request.request_id] == upto
    assert harness.backend.ended == {request.request_id: "closed"}


async def test_an_answer_cut_short_says_length() -> None:
    body = (await Harness(one_by_one(ENCODE("one"), FinishReason.LENGTH)).chat(max_tokens=1)).json()
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", [[2, *ENCODE("one")]]),
        (["one", "two"], [[2, *ENCODE("one")], [2, *ENCODE("two")]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_completions_take_four_kinds_of_prompts(prompt: Any, prompts: list[list[int]]) -> None:
    harness = Harness(one_by_one(ENCODE("yes")))
    response = await harness.post(COMPLETIONS, {"model": MODEL, "prompt": prompt, "n": 2})
    body = response.json()
    Completion.model_validate(body, strict=True)
    requests = sorted(harness.backend.requests, key=lambda request: int(request.request_id.rpartition("-")[2]))
    assert [list(request.token_ids) for request in requests] == [prompt for prompt in prompts for _ in range(2)]
    assert [request.stop.max_tokens for request in requests] == [16] * len(requests)
    expected = [
        {"text": "yes", "index": index, "logprobs": None, "finish_reason": "stop"} for index in range(len(requests))
    ]
    assert body["choices"] == expected
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == NUM_CACHED * len(prompts)


async def test_logprobs_of_completions() -> None:
    harness = Harness(one_by_one(ENCODE("ab")))
    logprobs = (await harness.post(COMPLETIONS, {"model": MODEL, "prompt": "x", "logprobs": 1})).json()["choices"][0][
        "logprobs"
    ]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"a": -0.25}, {"b": -0.25}],
        "text_offset": [0, 1],
    }
