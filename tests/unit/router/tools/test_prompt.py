"""What a chat template is given of tools, calls and results."""

from __future__ import annotations

from typing import Any

import pytest

from packlight.router.schema import ChatBody, Message
from packlight.router.tools.formats import HERMES, LLAMA, MISTRAL
from packlight.router.tools.model import ModelTools
from packlight.router.tools.prompt import described, in_words, natively
from packlight.router.tools.schema import Tool
from tests.support.tiny_tokenizer import tiny_model
from tests.unit.router.tools import templates
from tests.unit.router.tools.templates import Templated

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["b"]}
TOOL = {"type": "function", "function": {"strict": True, "parameters": SCHEMA, "name": "look", "description": "Looks."}}
LOOK = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"b": "é", "a": 1}'}}
ACT = {"id": "call_2", "type": "function", "function": {"name": "act", "arguments": ""}}


def messages(*given: dict[str, Any]) -> list[Message]:
    body = {"model": "m", "messages": list(given)}
    return ChatBody.model_validate(body).messages


USER = {"role": "user", "content": "Look."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [LOOK, ACT]}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{num}", "content": f"result {num}"} for num in (1, 2)]


def test_a_tool_has_the_keys_that_templates_know_and_its_schema_as_it_came() -> None:
    shown = described(Tool.model_validate(TOOL))
    assert list(shown["function"]) == ["name", "description", "parameters"]
    assert list(shown["function"]["parameters"]["properties"]) == ["b", "a"]
    bare = described(Tool.model_validate({"type": "function", "function": {"name": "act", "strict": None}}))
    assert bare["function"] == {"name": "act", "description": "", "parameters": {"type": "object", "properties": {}}}


def test_arguments_in_the_history_are_objects_where_they_can_be() -> None:
    odd = {**LOOK, "function": {"name": "look", "arguments": "{oops"}}
    number = {**LOOK, "function": {"name": "look", "arguments": "7"}}
    (shown,) = natively(messages({**CALLED, "tool_calls": [LOOK, ACT, odd, number]}), HERMES)
    assert shown["content"] == ""
    arguments = [call["function"]["arguments"] for call in shown["tool_calls"]]
    assert arguments == [{"b": "é", "a": 1}, {}, "{oops", "7"]


def test_a_message_without_calls_has_no_such_key() -> None:
    shown = natively(
        messages({**USER, "role": "developer"}, {"role": "assistant", "content": "x", "tool_calls": None}), None
    )
    assert shown == [{"role": "system", "content": "Look."}, {"role": "assistant", "content": "x"}]


def test_ids_get_the_length_a_template_insists_on() -> None:
    shown = natively(messages(USER, CALLED, *RESULTS), MISTRAL)
    ids = [call["id"] for call in shown[1]["tool_calls"]]
    assert ids == [result["tool_call_id"] for result in shown[2:]]
    assert len(set(ids)) == 2
    assert {len(one) for one in ids} == {9}
    kept = [{**call, "id": f"abcd1234{at}"} for at, call in enumerate((LOOK, ACT))]
    (shown,) = natively(messages({**CALLED, "tool_calls": kept}), MISTRAL)
    assert [call["id"] for call in shown["tool_calls"]] == ["abcd12340", "abcd12341"]


def test_in_words_calls_and_results_are_turns_that_alternate() -> None:
    turns = in_words(messages(USER, CALLED, *RESULTS, {"role": "user", "content": "And?"}, CALLED), [], HERMES)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[1]["content"] == (
        '<tool_call>\n{"name": "look", "arguments": {"b": "é", "a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "act", "arguments": {}}\n</tool_call>'
    )
    assert turns[2]["content"] == "look returned this:\nresult 1\n\nact returned this:\nresult 2\n\nAnd?"


def test_in_words_a_result_asks_for_an_answer() -> None:
    *_, last = in_words(messages(USER, CALLED, *RESULTS), [], HERMES)
    assert last["content"].endswith("returned this:\nresult 2\n\nNow answer in your own words.")
    assert last["content"].count("own words") == 1


def test_two_questions_in_a_row_stay_two() -> None:
    assert len(in_words(messages(USER, USER), [], HERMES)) == 2


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be brief."}]])
def test_in_words_tools_are_part_of_the_system_prompt(before: list[dict[str, Any]]) -> None:
    first, *rest = in_words(messages(*before, USER), [Tool.model_validate(TOOL)], HERMES)
    assert first["role"] == "system"
    assert first["content"].startswith("Be brief.\n\n" if before else "You can call")
    assert '{"name": "look", "description": "Looks.", "parameters": {"type": "object"' in first["content"]
    assert '<tool_call>\n{"name": "FUNCTION", "arguments": ' in first["content"]
    assert rest == [USER]


def test_without_a_system_prompt_tools_are_part_of_the_first_question() -> None:
    (turn,) = in_words(messages(USER), [Tool.model_validate(TOOL)], LLAMA, speaker="user")
    assert turn["role"] == "user"
    assert turn["content"].startswith("You can call")
    assert turn["content"].endswith("\n\nLook.")


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (templates.PLAIN, ()),
        (templates.FOREIGN, ()),
        (templates.NO_SYSTEM, ()),
        (templates.HERMES, ()),
        (templates.MISTRAL, ("[TOOL_CALLS]",)),
        (templates.NEMOTRON, ()),
        (templates.LLAMA, ()),
    ],
)
def test_every_model_is_told_of_tools_calls_and_results(template: str, marks: tuple[str, ...]) -> None:
    tokenizer = Templated(template, marks)
    tools = ModelTools(tokenizer, tiny_model().spec)
    one_call = {**CALLED, "tool_calls": [LOOK]}
    shown, options = tools.shown(messages(USER, one_call, RESULTS[0]), [Tool.model_validate(TOOL)])
    text = tokenizer.text(tokenizer.apply_chat_template(shown, add_generation_prompt=True, **options))
    for part in ("Looks.", "Look.", '"b": "é"', "result 1"):
        assert text.count(part) == 1, part
    again, _ = tools.shown(messages(USER, one_call, RESULTS[0]), [Tool.model_validate(TOOL)])
    assert again == shown, "the same tools are the same tokens"


def test_without_tools_a_prompt_is_what_it_was() -> None:
    tools = ModelTools(Templated(templates.PLAIN), tiny_model().spec)
    assert tools.shown(messages(USER, {"role": "function", "name": "f", "content": "1"}), []) == (
        [USER, {"role": "function", "name": "f", "content": "1"}],
        {},
    )
