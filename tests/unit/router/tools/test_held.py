"""Calls that are held to a grammar, written by a model that draws any byte it may, and read again."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.models.fake_spec import FAKE_EOS, FakeTokenizer, fake_spec
from packlight.models.grammar import Grammars, check_grammar, open_grammars
from packlight.router.tools.formats import FORMATS, HERMES, LLAMA, MISTRAL, CallFormat
from packlight.router.tools.held import CallGrammar
from packlight.router.tools.reader import CallReader
from packlight.router.tools.schema import Tool

# A byte that no UTF-8 text has stands for a special token.
MARK = 0xFF


def tool(name: str, parameters: dict[str, Any] | None, *, strict: bool = False) -> Tool:
    return Tool.model_validate(
        {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}
    )


LOOK = tool(
    "look",
    {"type": "object", "properties": {"at": {"enum": ["sea", "sky"]}, "far": {"type": "boolean"}}, "required": ["at"]},
)
STOP = tool("stop", None)
TOOLS = (LOOK, STOP)


class Bytes(FakeTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == MARK else super().token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id == MARK or super().is_special(token_id)


@cache
def grammars() -> Grammars:
    found = open_grammars(Bytes(), fake_spec())
    assert found is not None
    return found


def held(row: CallFormat, num_calls: int = 2, marks: dict[int, str] | None = None) -> CallGrammar:
    return CallGrammar(row, marks or {}, TOOLS, num_calls)


def allowed(grammar: str, text: str | bytes) -> set[str]:
    """The characters that may follow; "" is the end and "MARK" the special token."""
    mask = grammars().follow(grammar, text.encode() if isinstance(text, str) else text).allowed()
    return {{FAKE_EOS: "", MARK: "MARK"}.get(int(token), chr(token)) for token in np.flatnonzero(mask)}


def draw(data: st.DataObject, grammar: str, at_most: int = 400) -> bytes | None:
    """An answer that the grammar allows, or None where it does not end soon."""
    text = b""
    constraint = grammars().follow(grammar)
    while len(text) < at_most:
        ids = [int(token) for token in np.flatnonzero(constraint.allowed()) if token < 128 or token == MARK]
        token = data.draw(st.sampled_from(ids))
        if token == FAKE_EOS:
            return text
        constraint.add(token)
        text += bytes([token])
    return None


def read(row: CallFormat, text: str, thought: str = "") -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(row.reading({}), [one.function.name for one in TOOLS], "answer", thought=thought)
    heard = [reader.push(text), reader.finish()]
    calls = [call for one in heard for call in one.calls]
    return "".join(one.content for one in heard), [(call.name, json.loads(call.arguments)) for call in calls]


def is_valid(name: str, arguments: Any) -> bool:
    if name == "stop":
        return bool(arguments == {})
    known = set(arguments) <= {"at", "far"}
    return known and arguments["at"] in ("sea", "sky") and isinstance(arguments.get("far", True), bool)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_drawn_is_read_as_calls_of_the_schema(row: CallFormat, data: st.DataObject) -> None:
    marks = {MARK: row.opening} if row is MISTRAL else {}
    num_calls = row.num_calls or 3
    text = draw(data, held(row, num_calls, marks).required("", may_think=False))
    assert text is not None
    content, calls = read(row, text.replace(bytes([MARK]), row.opening.encode()).decode())
    assert content == ""
    assert 1 <= len(calls) <= num_calls
    assert all(is_valid(*call) for call in calls)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_grammar_can_be_followed(row: CallFormat) -> None:
    for num_calls in (1, 8):
        for thought in ("", "</think>"):
            for may_think in (False, True):
                assert check_grammar(held(row, num_calls).required(thought, may_think=may_think)) == []
            assert check_grammar(held(row, num_calls).optional(thought)) == []


def test_text_is_free_until_the_mark() -> None:
    grammar = held(HERMES).optional("")
    for free in ("", "Some text, <tool", '{"name": "x"}'):
        assert {"", "a", "<", "{", "\n"} <= allowed(grammar, free)
    assert allowed(grammar, "Well. <tool_call>") == {"\n"}
    assert allowed(grammar, 'Well. <tool_call>\n{"name": "') == {"l", "s"}
    after = allowed(grammar, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert {"", "a", "\n", "<"} <= after


def test_one_call_ends_an_answer() -> None:
    grammar = held(HERMES, 1).optional("")
    assert allowed(grammar, 'x <tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>') == {""}


def test_a_mark_that_is_a_special_token() -> None:
    grammar = held(MISTRAL, marks={MARK: "[TOOL_CALLS]"}).optional("")
    assert "MARK" in allowed(grammar, "Well. ")
    assert allowed(grammar, b"Well. " + bytes([MARK])) == {" ", "["}
    assert allowed(held(MISTRAL, marks={MARK: "[TOOL_CALLS]"}).required("", may_think=False), "") == {"MARK"}


def test_without_a_mark_the_first_character_tells() -> None:
    grammar = held(LLAMA, 1).optional("")
    assert {"", "a", "{", " "} <= allowed(grammar, "")
    assert allowed(grammar, "{") == {'"'}
    assert "a" in allowed(grammar, "x {")


def test_calls_come_after_the_thoughts() -> None:
    opened = held(HERMES).required("</think>", may_think=True)
    assert {"a", "<"} <= allowed(opened, "hm, <tool_call>")
    assert "" not in allowed(opened, "hm")
    assert allowed(opened, "hm</think>") == {"\n", "<"}
    assert allowed(opened, "hm</think>\n\n") == {"<"}
    free = held(HERMES).required("", may_think=True)
    assert allowed(free, "<t") == {"h", "o"}
    assert allowed(free, "<think>hm</think>\n\n<") == {"t"}
    optional = held(HERMES).optional("</think>")
    assert "a" in allowed(optional, "<tool_call>")
    assert allowed(optional, "</think><tool_call>") == {"\n"}


def test_a_function_gets_what_it_knows_unless_its_schema_says_more() -> None:
    def after(parameters: dict[str, Any]) -> set[str]:
        grammar = CallGrammar(HERMES, {}, [tool("f", parameters)], 1).required("", may_think=False)
        return allowed(grammar, '<tool_call>\n{"name": "f", "arguments": {')

    properties = {"a": {"type": "integer"}}
    assert after({"properties": properties, "required": ["a"]}) == {'"'}
    assert after({"properties": properties}) == {'"', "}"}
    assert after({}) == {"}"}
    grammar = CallGrammar(HERMES, {}, [tool("f", {"additionalProperties": {"type": "integer"}})], 1)
    assert "z" in allowed(grammar.required("", may_think=False), '<tool_call>\n{"name": "f", "arguments": {"')


def test_strict_schemas_are_refused_for_what_loose_ones_are_warned_of() -> None:
    odd = {"type": "object", "properties": {"a": {"not": {}}}}
    loose = CallGrammar(HERMES, {}, [tool("f", odd)], 1).required("", may_think=False)
    assert check_grammar(loose) == ['Unimplemented keys: ["not"]']
