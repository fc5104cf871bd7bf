"""Every way to ask for something wrong, and the one error it gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from packlight.router.validate import MAX_BRACKETS
from tests.support.router_harness import CHAT, COMPLETIONS, MODEL, Harness, chat_body
from tests.support.scripted_backend import one_by_one

USER = {"role": "user", "content": "secret-word"}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, fields]}


def schema(wanted: dict[str, Any], *, name: str = "s", strict: bool = False) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": strict, "schema": wanted}}


# (fields that replace those of a good chat request, param, code)
BAD_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "secret-word"}, "messages", "invalid_type"),
    ({"messages": ["secret-word"]}, "messages[0]", "invalid_type"),
    (message(content="x"), "messages[1].role", "missing_required_parameter"),
    (message(role="secret-word", content="x"), "messages[1].role", "invalid_value"),
    (message(role=7, content="x"), "messages[1].role", "invalid_value"),
    (message(role="user", content=7), "messages[1].content", "invalid_type"),
    (message(role="user", content=None), "messages[1].content", "missing_required_parameter"),
    (message(role="user"), "messages[1].content", "missing_required_parameter"),
    (message(role="tool", content="x"), "messages[1].tool_call_id", "missing_required_parameter"),
    (
        message(role="user", content=[{"type": "image_url", "image_url": {"url": "http://secret-word"}}]),
        "messages[1].content[0]",
        "unsupported_value",
    ),
    (message(role="user", content=[{"type": "text"}]), "messages[1].content[0].text", "invalid_type"),
    (message(role="user", content=["secret-word"]), "messages[1].content[0]", "unsupported_value"),
    ({"messages": [{"role": "assistant", "content": "a"}] * 2}, "messages", "invalid_value"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": ""}, "model", "empty_string"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": "secret-word"}, "model", "model_not_found"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "decimal_below_min_value"),
    ({"top_p": 1.01}, "top_p", "decimal_above_max_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"n": 9}, "n", "integer_above_max_value"),  # max_inflight is 8
    ({"n": 1.5}, "n", "invalid_type"),
    ({"n": 10**30}, "n", "integer_above_max_value"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens", "invalid_type"),
    ({"max_tokens": 100_000}, "messages", "context_length_exceeded"),
    ({"stop": ""}, "stop[0]", "empty_string"),
    ({"stop": ["a", ""]}, "stop[1]", "empty_string"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"stop": 1}, "stop", "invalid_type"),
    ({"stop": "s" * 2000}, "stop[0]", "string_above_max_length"),
    ({"seed": 2**63}, "seed", "integer_above_max_value"),
    ({"seed": 1.0}, "seed", "invalid_type"),
    ({"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "decimal_below_min_value"),
    ({"logit_bias": {"secret-word": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"364": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
    ({"logit_bias": {"secret-word\n": 101}}, "logit_bias", "decimal_above_max_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "object_above_max_properties"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "integer_above_max_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"min_p": 1.5}, "min_p", "decimal_above_max_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", "decimal_below_min_value"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "decimal_above_max_value"),
    ({"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ({"stop_token_ids": [364]}, "stop_token_ids[0]", "integer_above_max_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "integer_below_min_value"),
    ({"cache_salt": "a/b"}, "cache_salt", "invalid_value"),
    ({"cache_salt": "s" * 129}, "cache_salt", "string_above_max_length"),
    ({"kv": "snapkv"}, "kv", "invalid_type"),
    ({"kv": {"recipe": "secret"}}, "kv.recipe", "invalid_value"),
    ({"kv": {"recipe": ["secret-word"]}}, "kv.recipe", "invalid_type"),
    ({"kv": {"recipe": "snapkv", "budget": 0}}, "kv.budget", "invalid_value"),
    ({"kv": {"recipe": "snapkv", "speed": 1}}, "kv.speed", "invalid_value"),
    ({"kv": {"secret-word\n": 1}}, "kv", "unknown_parameter"),
    ({"kv": {"recipe": "s" * 65}}, "kv.recipe", "invalid_type"),
    ({"chat_template_kwargs": {"secret-word\n": 1}}, "chat_template_kwargs", "unsupported_parameter"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize", "unsupported_parameter"),
    ({"prompt_cache_options": {"mode": "secret-word"}}, "prompt_cache_options.mode", "invalid_value"),
    ({"response_format": {"type": "secret-word"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": schema({"type": "secre"})}, "response_format.json_schema.schema", "invalid_value"),
    ({"response_format": schema({"not": {}}, strict=True)}, "response_format.json_schema.schema", "invalid_value"),
    ({"response_format": schema({}, name="a b")}, "response_format.json_schema.name", "invalid_value"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unsupported_parameter"),
    (
        {"response_format": schema({}) | {"type": "text"}},
        "response_format.json_schema",
        "invalid_value",
    ),
    ({"response_format": schema({"const": 2**64})}, "response_format.json_schema.schema", "invalid_value"),
    ({"structured_outputs": {"json": {"const": 2**64}}}, "structured_outputs.json", "invalid_value"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens", "invalid_value"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ({"response_format": {"type": "json_object"}, "reasoning_effort": "high"}, "response_format", "invalid_value"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "invalid_value",
    ),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ({"guided_\nx": 1}, "guided_*", "unsupported_parameter"),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "invalid_value"),
    ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex", "string_above_max_length"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty_array"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", "empty_string"),
    ({"structured_outputs": {"grammar": "secret-word"}}, "structured_outputs.grammar", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"prediction": {"type": "content"}}, "prediction", "unsupported_parameter"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "unsupported_parameter"),
    ({"continue_final_message": True}, "continue_final_message", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"stop_regex": "secret-word"}, "stop_regex", "unsupported_parameter"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "unsupported_parameter"),
]

BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": [[]]}, "prompt[0]", "empty_array"),
    ({"prompt": [5, "x"]}, "prompt[0]", "invalid_type"),
    ({"prompt": ["x", [5, -1]]}, "prompt[1]", "invalid_type"),
    ({"prompt": [364]}, "prompt", "integer_above_max_value"),
    ({"prompt": [[1], [364]]}, "prompt[1]", "integer_above_max_value"),
    ({"prompt": ["x"] * 5, "n": 2}, "prompt", "array_above_max_length"),
    ({"prompt": "x", "logprobs": 6}, "logprobs", "integer_above_max_value"),
    ({"prompt": "x", "echo": True}, "echo", "unsupported_parameter"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
    ({"prompt": [5] * 300}, "prompt", "context_length_exceeded"),
]


async def check(path: str, body: Any, param: str | None, code: str) -> None:
    harness = Harness(max_inflight=8)
    response = await harness.post(path, body)
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = response.json()["error"]
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert 10 < len(error["message"].encode()) <= 1000
    assert "secret-word" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert harness.backend.requests == []
    assert sum(harness.outcomes("chat").values()) + sum(harness.outcomes("completions").values()) == 1
    assert harness.gate.num_inside == 0


@pytest.mark.parametrize(("fields", "param", "code"), BAD_CHATS, ids=lambda value: str(value)[:40])
async def test_bad_chats(fields: dict[str, Any], param: str | None, code: str) -> None:
    await check(CHAT, chat_body() | fields, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_bad_completions(fields: dict[str, Any], param: str | None, code: str) -> None:
    await check(COMPLETIONS, {"model": MODEL} | fields, param, code)


NOT_JSON = [
    b"",
    b"secret-word",
    b'{"model": "tiny/model",}',
    b'{"temperature": NaN}',
    b'{"user": "\\ud800"}',
    b"\xff",
    b"[" * 500 + b"]" * 500,
    b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"a":[' + b"[]," * MAX_BRACKETS + b"[]]}",
    b'{"n": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:24]))
async def test_what_is_not_json(body: bytes) -> None:
    await check(CHAT, body, None, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"secret-word"', b"7", b"null"])
async def test_json_that_is_not_an_object(body: bytes) -> None:
    await check(CHAT, body, None, "invalid_type")


WORDINGS = [
    ({"n": 130}, "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 130 instead."),
    (
        {"temperature": -1},
        "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got -1 instead.",
    ),
    ({"temperature": "hot"}, "Invalid type for 'temperature': expected a decimal, but got a string instead."),
    ({"messages": None}, "Missing required parameter: 'messages'."),
    ({"top_p": 0}, "Invalid 'top_p': decimal below minimum value. Expected a value > 0, but got 0 instead."),
]


@pytest.mark.parametrize(("fields", "message"), WORDINGS, ids=lambda value: str(value)[:40])
async def test_the_wording_is_openais(fields: dict[str, Any], message: str) -> None:
    response = await Harness().post(CHAT, chat_body() | fields)
    assert response.json()["error"]["message"] == message


async def test_too_long_a_prompt_says_so_in_the_words_frameworks_look_for() -> None:
    response = await Harness(max_context=64).chat("xyz" * 40)
    num_tokens = len(tokens_of("xyz" * 40))
    assert response.json()["error"] == {
        "message": f"This model's maximum context length is 64 tokens. However, your messages resulted in {num_tokens} "
        "tokens. Please reduce the length of the messages.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


async def test_too_long_an_answer_says_both_numbers() -> None:
    response = await Harness(max_context=64).chat("one", max_tokens=60)
    num_tokens = len(tokens_of("one"))
    assert response.json()["error"]["message"] == (
        f"This model's maximum context length is 64 tokens. However, you requested {num_tokens + 60} tokens "
        f"({num_tokens} in the messages, 60 in the completion). Please reduce the length of the messages or completion."
    )


async def test_the_context_may_be_filled_to_the_last_token() -> None:
    num_left = 64 - len(tokens_of("one"))
    for limits, status in (({"max_tokens": num_left}, 200), ({"max_tokens": num_left + 1}, 400)):
        assert (await Harness(one_by_one([80]), max_context=64).chat("one", **limits)).status_code == status
    fits, one_more = [5] * 63, [5] * 64
    for prompt, status in ((fits, 200), (one_more, 400)):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        assert (await Harness(one_by_one([80]), max_context=64).post(COMPLETIONS, body)).status_code == status


async def test_a_text_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(max_context=64)
    monkeypatch.setattr(type(harness.model.tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
    for path, body in ((CHAT, chat_body("x" * 100_000)), (COMPLETIONS, {"model": MODEL, "prompt": "x" * 100_000})):
        error = (await harness.post(path, body)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 64 tokens. However, your messages")


async def test_the_error_of_a_very_bad_body_stays_small() -> None:
    body = chat_body() | {
        "messages": [{"role": 5, "content": {"a": "secret-word"}}] * 20_000,
        "n": "secret-word" * 1000,
    }
    response = await Harness().post(CHAT, body)
    assert response.status_code == 400
    assert len(response.content) < 1500
    assert "secret-word" not in response.text


def tokens_of(content: str) -> list[int]:
    messages = [{"role": "user", "content": content}]
    return Harness().model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none"},
        {"modalities": ["text"], "store": True, "user": "u", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"temperature": None, "stop": None, "n": None, "tools": None, "guided_json": None, "kv": None, "seed": None},
        {"kv": {"recipe": None}},
        {"stop": []},
    ],
    ids=json.dumps,
)
async def test_fields_that_ask_for_nothing_special_are_accepted(fields: dict[str, Any]) -> None:
    response = await Harness(one_by_one([80])).chat(**fields)
    assert response.status_code == 200
    assert "warning" not in response.headers


async def test_unknown_fields_are_ignored_and_named() -> None:
    harness = Harness(one_by_one([80]))
    response = await harness.chat(priority=3, **{"bad\nname": 1})
    assert response.status_code == 200
    assert response.headers["warning"] == '299 packlight "ignored unknown parameters: priority and 1 more"'
    assert harness.metric("ignored_parameters_total") == 2
