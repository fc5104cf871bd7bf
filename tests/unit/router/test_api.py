"""Whole answers and everything around them, in memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from packlight.core.errors import (
    Draining,
    InternalError,
    NoWorker,
    PacklightError,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    WorkerLost,
)
from packlight.core.types import FinishReason, PackSpec, SamplingParams, StopRules
from packlight.router.params import derive_seed
from packlight.router.service import Readiness
from tests.support.router_harness import CHAT, COMPLETIONS, JSON, MODEL, Harness, chat_body
from tests.support.scripted_backend import NUM_CACHED, End, Fail, Say, Throw, one_by_one
from tests.support.tiny_tokenizer import EOS_ID, tiny_tokenizer

ENCODE = tiny_tokenizer().encode


async def test_a_chat_completion_has_every_field_of_openais_schema() -> None:
    ids = ENCODE("Hello world")
    harness = Harness(one_by_one([*ids, EOS_ID]))
    response = await harness.chat("two words")
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
            "kept_tokens": 12.5,
            "prompt_tokens": num_prompt,
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
    assert request.pack == PackSpec("snapkv", 64, None, 8, 2, 15)
    assert request.cache_salt == "tenant-1"
    assert request.request_id.endswith("-0")
    assert 590 < request.deadline_s <= 600


async def test_without_limits_the_answer_may_fill_the_context() -> None:
    harness = Harness(one_by_one([80]), max_context=200)
    await harness.chat(top_k=-1)
    (request,) = harness.backend.requests
    assert request.stop.max_tokens == 200 - request.num_prompt_tokens
    assert request.sampling == SamplingParams(seed=request.sampling.seed)
    assert request.pack == PackSpec()


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
    assert body["usage"]["kv"] is None
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
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


ERRORS: list[tuple[Exception, int, str, str, bool]] = [
    (QueueFull("full", retry_after_s=2.5), 429, "rate_limit_error", "rate_limit_exceeded", True),
    (NoWorker("no decode worker"), 503, "server_error", "no_capacity", True),
    (Draining("bye"), 503, "server_error", "draining", True),
    (WorkerLost("10.0.0.7:1234 is gone"), 503, "server_error", "worker_lost", True),
    (ShipmentCorrupt("10.0.0.7:1234 sent a bad page"), 502, "server_error", "shipment_corrupt", True),
    (RequestNeverFits("too big for the pool"), 400, "invalid_request_error", "kv_never_fits", False),
    (InternalError("10.0.0.7 /home/x.py"), 500, "server_error", "internal_error", False),
    (ZeroDivisionError("10.0.0.7 /home/x.py"), 500, "server_error", "internal_error", False),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code", "again"), ERRORS, ids=lambda value: str(value)[:20])
async def test_an_error_before_the_first_event_is_a_clean_status(
    error: Exception, status: int, kind: str, code: str, again: bool, stream: bool
) -> None:
    scripts = [[Throw(error)], [Fail(error)]] if isinstance(error, PacklightError) else [[Throw(error)]]
    for script in scripts:
        harness = Harness(script)
        response = await harness.chat(stream=stream)
        assert response.status_code == status
        assert {**response.json()["error"], "message": 0} == {"message": 0, "type": kind, "param": None, "code": code}
        assert response.headers["x-should-retry"] == str(again).lower()
        assert "10.0.0.7" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
        assert harness.metric("errors_total", type=type(error).__name__) == 1
        assert harness.backend.num_open == 0


async def test_retry_after_is_in_seconds_and_milliseconds() -> None:
    response = await Harness([Throw(QueueFull("full", retry_after_s=2.5))]).chat()
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2500"


async def test_an_answer_without_an_end_is_our_bug() -> None:
    response = await Harness([Say([80])]).chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


async def test_one_failed_choice_fails_the_request_and_closes_the_others() -> None:
    def script(request: Any) -> Any:
        return [Fail(WorkerLost("gone"))] if request.request_id.endswith("-1") else [Say([80]), End()]

    harness = Harness(script)
    response = await harness.chat(n=3)
    assert response.status_code == 503
    assert harness.backend.num_open == 0
    assert harness.outcomes() == {"failed": 1.0}


async def test_models() -> None:
    harness = Harness()
    async with harness.client() as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model.keys() == {"id", "object", "created", "owned_by", "root", "max_model_len"}
        assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 256)
        assert (await client.get(f"/v1/models/{MODEL}")).json() == model
        missing = await client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_health() -> None:
    harness = Harness()
    async with harness.client() as client:
        for path in ("/health", "/health/ready"):
            ready = await client.get(path)
            assert ready.status_code == 200
            assert ready.json()["details"] == {"decode_workers": 1, "prefill_workers": 1, "index_available": True}
        harness.backend.readiness_now = Readiness(False, {"decode_workers": 0})
        unready = await client.get("/health/ready")
        assert (unready.status_code, unready.json()["ready"]) == (503, False)
        assert unready.json()["details"] == {"decode_workers": 0}
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_metrics_are_exposed(accept: str) -> None:
    harness = Harness(one_by_one([80]))
    await harness.chat()
    async with harness.client() as client:
        response = await client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert 'packlight_router_requests_total{endpoint="chat",outcome="completed"} 1.0' in response.text
    assert response.text.rstrip().endswith("# EOF") == bool(accept)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", CHAT + "/", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/openapi.json", 404, "not_found"),
    ],
)
async def test_paths_and_methods_that_do_not_exist_answer_in_json(
    method: str, path: str, status: int, code: str
) -> None:
    async with Harness().client() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert ("allow" in response.headers) == (status == 405)
    assert response.headers["x-request-id"].startswith("req_")


async def test_large_bodies_are_refused_unread() -> None:
    harness = Harness(max_body_bytes=2048)
    response = await harness.chat("x" * 2048)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    async with harness.client() as client:
        response = await client.post(CHAT, content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert harness.outcomes() == {"invalid": 2.0}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_web_page_cannot_post_without_asking(kind: str) -> None:
    """These are the media types that browsers send to other origins without a preflight request."""
    response = await Harness(one_by_one([80])).post(CHAT, chat_body(), {"content-type": kind})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_json_with_a_charset_is_json() -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await Harness(one_by_one([80])).post(CHAT, chat_body(), kind)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "x/?", "x/v1/models?", "router:99999", "[::1", "a b"])
async def test_the_host_header_decides_nothing(host: str) -> None:
    harness = Harness(one_by_one([80]))
    assert (await harness.post(CHAT, chat_body(), {"host": host})).status_code == 200
    async with harness.client() as client:
        assert (await client.get("/v1/nothing", headers={"host": host})).status_code == 404
        assert (await client.get("/health/live/", headers={"host": host})).status_code == 404


@pytest.mark.parametrize("given", ["abc-123", "trace:4.5_6"])
async def test_a_good_request_id_is_echoed(given: str) -> None:
    harness = Harness(one_by_one([80]))
    for response in (
        await harness.post(CHAT, chat_body(), {"x-request-id": given}),
        await harness.post(CHAT, b"{", {"x-request-id": given}),
    ):
        assert response.headers["x-request-id"] == given
        assert response.headers["openai-version"] == "2020-10-01"
        assert int(response.headers["openai-processing-ms"]) >= 0
    assert given not in harness.backend.requests[0].request_id


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "é"])
async def test_a_bad_request_id_is_replaced(given: str) -> None:
    harness = Harness(one_by_one([80]))
    async with harness.client() as client:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", given.encode())]
        response = await client.post(CHAT, json=chat_body(), headers=headers)
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_bug_in_a_route_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.backend.readiness_now = None  # type: ignore[assignment]
    async with harness.client() as client:
        response = await client.get("/health", headers={"x-request-id": "the-id"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "the-id"
    assert "the-id" in caplog.text
    assert "AttributeError" in caplog.text
