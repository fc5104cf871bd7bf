"""Tool calls over HTTP: what the workers get, and what the client does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from packlight.core.types import FinishReason
from packlight.router.tools.calls import call_id
from tests.support.router_harness import CHAT, MODEL, Harness, chat_body, events_of, serving, streamed_text
from tests.support.scripted_backend import End, Say, Step, one_by_one
from tests.support.tiny_tokenizer import EOS_ID, TinyTokenizer, tiny_tokenizer
from tests.unit.router.tools import templates
from tests.unit.router.tools.templates import Templated

ENCODE = tiny_tokenizer().encode
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}
ACT = {"type": "function", "function": {"name": "act"}}
TOOLS = [LOOK, ACT]
NAMED = {"type": "function", "function": {"name": "act"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "a sea"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "act", "arguments": {}}\n</tool_call>'


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


def said(text: str, reason: FinishReason = FinishReason.STOP) -> list[Step]:
    return one_by_one([*ENCODE(text), EOS_ID] if reason is FinishReason.STOP else ENCODE(text), reason)


def harness_of(script: Sequence[Step], tokenizer: TinyTokenizer | None = None, **options: Any) -> Harness:
    harness = Harness(script, **{"max_context": 4096, **options})
    if tokenizer is not None:
        harness.model = replace(harness.model, tokenizer=tokenizer)
        harness.use_backend(harness.backend)
    return harness


async def ask(script: Sequence[Step], **fields: Any) -> tuple[dict[str, Any], Harness]:
    """The first choice, and the harness it came from."""
    harness = harness_of(script)
    response = await harness.chat(**{"tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json(), strict=True)
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice, harness


def grammar_of(harness: Harness) -> str:
    (request,) = harness.backend.requests
    return request.sampling.grammar


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_calls_of_a_whole_answer() -> None:
    choice, harness = await ask(said(f"{CALL}\n{OTHER}"))
    (request,) = harness.backend.requests
    ids = [call_id(request.request_id, index) for index in (0, 1)]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": ids[0], "type": "function", "function": {"name": "look", "arguments": '{"at": "a sea"}'}},
            {"id": ids[1], "type": "function", "function": {"name": "act", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"


async def test_an_answer_without_calls_is_as_ever() -> None:
    choice, _ = await ask(said("Just words. "))
    assert choice["message"] == {"role": "assistant", "content": "Just words. ", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_an_answer_that_is_cut_within_a_call_is_cut() -> None:
    choice, _ = await ask(said(f"Well, {CALL}"[:-18], FinishReason.LENGTH))
    assert choice["message"]["content"] == "Well,"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"at": "a s'
    assert choice["finish_reason"] == "length"


async def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    text = f"Let me see. {CALL}\n{OTHER} Done."
    whole, _ = await ask(said(text), n=2)
    for script in (said(text), [Say([*ENCODE(text), EOS_ID]), End()]):
        harness = harness_of(script)
        response = await harness.chat(tools=TOOLS, stream=True)
        chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events_of(response)[:-1]]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert streamed_text(events_of(response)) == whole["message"]["content"] == "Let me see. Done."
        pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
        for index, call in enumerate(whole["message"]["tool_calls"]):
            own = [piece for piece in pieces if piece.index == index]
            assert (own[0].type, own[0].function.name) == ("function", call["function"]["name"])
            assert own[0].id == call_id(harness.backend.requests[0].request_id, index)
            assert all(piece.id is piece.type is piece.function.name is None for piece in own[1:])
            assert "".join(piece.function.arguments for piece in own) == call["function"]["arguments"]
        assert max(len(delta.tool_calls or ()) for delta in deltas) <= 2
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


async def test_every_choice_has_its_own_calls() -> None:
    harness = harness_of(said(CALL))
    response = await harness.chat(tools=TOOLS, n=2)
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in response.json()["choices"]}
    assert len(ids) == 2


async def test_one_call_at_a_time_ends_the_answer() -> None:
    choice, harness = await ask([Say([token]) for token in ENCODE(f"{CALL}\n{OTHER}" * 9)], parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["look"]
    assert choice["finish_reason"] == "tool_calls"
    assert harness.backend.num_open == 0


async def test_log_probabilities_are_of_all_that_was_written() -> None:
    choice, _ = await ask(said(f"Well. {CALL}"), logprobs=True)
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == f"Well. {CALL}"


async def test_a_stop_string_ends_calls_too() -> None:
    choice, _ = await ask(said(f"Well. {CALL}"), stop=["sea"])
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"at": "a '
    assert choice["finish_reason"] == "tool_calls"


async def test_marks_that_are_special_tokens_are_read_and_never_shown() -> None:
    tokenizer = Templated(templates.MISTRAL, ["[TOOL_CALLS]"])
    text = '[TOOL_CALLS] [{"name": "act", "arguments": {}}]'
    for script, content in ((text, None), ("Hm [TOOL_CALLS] no", "Hm [TOOL_CALLS] no")):
        harness = harness_of(one_by_one([*tokenizer.encode(script), EOS_ID]), tokenizer)
        message = (await harness.chat(tools=TOOLS)).json()["choices"][0]["message"]
        assert message["content"] == content
        assert bool(message.get("tool_calls")) == (content is None)
    plain = harness_of(one_by_one([*tokenizer.encode(text), EOS_ID]), tokenizer)
    message = (await plain.chat()).json()["choices"][0]["message"]
    assert message["content"] == ' [{"name": "act", "arguments": {}}]', "without tools a special token has no text"


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def prompt_of(**fields: Any) -> str:
    harness = harness_of(said("x"), fields.pop("tokenizer", None))
    response = await harness.post(CHAT, chat_body() | fields)
    assert response.status_code == 200, response.text
    (request,) = harness.backend.requests
    return tiny_tokenizer().text([token for token in request.token_ids if token < harness.model.spec.vocab_size])


async def test_a_model_is_told_of_its_tools_and_not_of_those_it_may_not_call() -> None:
    told = await prompt_of(tools=TOOLS)
    assert '{"name": "look", "description": "Looks.", "parameters": {"type": "object"' in told
    assert await prompt_of(tools=TOOLS, tool_choice="required") == told
    assert await prompt_of(tools=[strict(LOOK), ACT], parallel_tool_calls=False) == told
    assert await prompt_of(tools=TOOLS, tool_choice="none") == await prompt_of() == await prompt_of(tools=[])


async def test_the_next_turn_has_calls_and_results() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    turns = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Waves."},
    ]
    told = await prompt_of(messages=turns, tools=TOOLS)
    assert "look returned this:\nWaves.\n" in told
    native = await prompt_of(messages=turns, tools=TOOLS, tokenizer=Templated(templates.HERMES))
    assert native.endswith("tool\nWaves.\nassistant\n")
    for prompt in (told, native):
        assert '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>' in prompt


@pytest.mark.parametrize("template", [templates.PLAIN, templates.HERMES, templates.MISTRAL, templates.LLAMA])
async def test_tools_are_protected_when_a_prompt_is_packed(template: str) -> None:
    tokenizer = Templated(template)
    policy = {"rows": [{"min_tokens": 0, "recipe": "snapkv", "ratio": 0.5}]}
    harness = harness_of(said("x"), tokenizer, max_context=20_000, kv={"policy": policy})
    kv = (await harness.chat("one two three " * 600, tools=TOOLS)).json()["usage"]["kv"]
    (request,) = harness.backend.requests
    protected = tokenizer.text(request.token_ids[: kv["protected_tokens"]])
    assert "Looks." in protected
    assert '"act"' in protected
    assert "one two" not in protected
    assert request.pack.sinks == kv["protected_tokens"]


async def test_tools_too_long_to_fit_are_not_tokenised() -> None:
    long = {**LOOK, "function": {**LOOK["function"], "description": "x" * 100_000}}
    response = await harness_of(said("x"), max_context=64).chat(tools=[long])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert response.json()["error"]["code"] == "context_length_exceeded"


# ── what calls are held to ───────────────────────────────────────────────────────────────────────────────────────────


async def test_free_calls_are_held_to_nothing() -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "none", "tools": [strict(LOOK)]}):
        _, harness = await ask(said("x"), **fields)
        assert grammar_of(harness) == ""


async def test_calls_that_must_be_are_held_to_the_schemas() -> None:
    _, harness = await ask(said(CALL), tool_choice="required")
    assert grammar_of(harness).startswith("start: calls")
    assert '\\"look\\"' in grammar_of(harness)
    _, harness = await ask(said(OTHER), tool_choice=NAMED)
    assert '\\"look\\"' not in grammar_of(harness)
    assert "{0," not in grammar_of(harness), "one call, of the function that is named"


async def test_strict_tools_hold_the_calls_of_a_free_answer() -> None:
    _, harness = await ask(said(CALL), tools=[strict(LOOK), ACT])
    assert "head[lazy]" in grammar_of(harness)


async def test_a_model_that_thinks_may_do_so_before_it_must_call() -> None:
    _, harness = await ask(said(f"<think>{OTHER}</think>{CALL}"), tool_choice="required", reasoning_effort="high")
    assert "thought[lazy]" in grammar_of(harness)
    assert '"<think>" thought' in grammar_of(harness)


async def test_calls_come_after_thoughts_that_the_prompt_opens() -> None:
    tokenizer = Templated(templates.HERMES + "{% if enable_thinking %}<think>\n{% endif %}")
    for choice in ("auto", "required"):
        harness = harness_of(said(f"{OTHER}</think>{CALL}"), tokenizer)
        options = {"tool_choice": choice, "chat_template_kwargs": {"enable_thinking": True}}
        message = (await harness.chat("What is <think>?", tools=TOOLS, **options)).json()["choices"][0]["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"]
        assert message["content"] == f"{OTHER}</think>"
    assert grammar_of(harness).startswith("start: thought")


async def test_a_question_about_thoughts_opens_none() -> None:
    harness = harness_of(said(CALL))
    message = (await harness.chat("What is <think>?", tools=TOOLS)).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"]


async def test_what_a_loose_schema_leaves_out_is_said_in_a_header() -> None:
    odd = {**ACT, "function": {"name": "act", "parameters": {"properties": {"a": {"not": {}}}}}}
    harness = harness_of(said(OTHER))
    response = await harness.chat(tools=[odd], tool_choice="required")
    assert "'not'" in response.headers["warning"]
    response = await harness.chat(tools=[LOOK, strict(odd)])
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("tools[1].function.parameters", "invalid_value")
    assert "not" in error["message"]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [ACT, {"type": "function", "function": {"name": "secret", **fields}}]}


def calls(*given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": list(given)}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": 7}, "tools", "invalid_type"),
    ({"tools": ["secret-word"]}, "tools[0]", "invalid_type"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
    ({"tools": [ACT] * 129}, "tools", "array_above_max_length"),
    ({"tools": [LOOK, ACT, ACT]}, "tools[2].function.name", "invalid_value"),
    (function(name="secret word"), "tools[1].function.name", "invalid_value"),
    (function(name="s" * 65), "tools[1].function.name", "invalid_value"),
    (function(description=7), "tools[1].function.description", "invalid_type"),
    (function(parameters=[]), "tools[1].function.parameters", "invalid_type"),
    (function(parameters={"type": "string"}), "tools[1].function.parameters", "invalid_value"),
    (function(strict="yes"), "tools[1].function.strict", "invalid_type"),
    (
        function(parameters={"properties": {"a": {"const": 2**64}}}) | {"tool_choice": "required"},
        "tools[1].function.parameters",
        "invalid_value",
    ),
    (
        function(parameters={"properties": {"a": {"type": "strin"}}}) | {"tool_choice": "required"},
        "tools[1].function.parameters",
        "invalid_value",
    ),
    ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": "secret-word"}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": 7}, "tool_choice", "invalid_type"),
    ({"tools": TOOLS, "tool_choice": {}}, "tool_choice.type", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, "tool_choice.type", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "secret-word"}}},
        "tool_choice.function.name",
        "invalid_value",
    ),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "invalid_type"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
    ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 2}, "min_tokens", "invalid_value"),
    ({"tools": [strict(ACT)], "ignore_eos": True}, "ignore_eos", "invalid_value"),
    (calls(), "messages[0].content", "missing_required_parameter"),
    (
        calls({"function": {"name": "a", "arguments": ""}}),
        "messages[0].tool_calls[0].id",
        "missing_required_parameter",
    ),
    (calls({"id": "1", "type": "custom"}), "messages[0].tool_calls[0].type", "invalid_value"),
    (
        calls({"id": "1", "type": "function", "function": {"name": "a", "arguments": {}}}),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_type",
    ),
    (
        {"messages": [{"role": "tool", "tool_call_id": "secret-word", "content": "x"}]},
        "messages[0].tool_call_id",
        "invalid_value",
    ),
    ({"functions": [{"name": "a"}]}, "functions", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=lambda value: str(value)[:50])
async def test_bad_requests(fields: dict[str, Any], param: str, code: str) -> None:
    harness = harness_of(said("x"), max_inflight=8)
    response = await harness.post(CHAT, chat_body() | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert "secret" not in response.text
    assert harness.backend.requests == []


async def test_plain_completions_call_nobody() -> None:
    response = await Harness().post("/v1/completions", {"model": MODEL, "prompt": "a", "tools": TOOLS})
    assert response.json()["error"]["code"] == "unsupported_parameter"


# ── a client ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_real_client_goes_through_two_turns() -> None:
    scripts = iter([said(f"Let me see. {CALL}"), said("Waves.")])
    harness = harness_of([])
    harness.backend.script = lambda _: next(scripts)
    messages: list[Any] = [{"role": "user", "content": "What is there?"}]
    tools: Any = TOOLS
    async with serving(harness.app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        async with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
            answer = (await stream.get_final_completion()).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("look", '{"at": "a sea"}')
        messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "Waves."}]
        second = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
    assert second.choices[0].message.content == "Waves."
