"""Reading calls from answers, however they are cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packlight.router.tools.calls import call_id
from packlight.router.tools.formats import FORMATS, HERMES, LLAMA, MISTRAL, NEMOTRON, CallFormat
from packlight.router.tools.reader import CallReader

NAMES = ("look", "act")
LOOK = '{"name": "look", "arguments": {"at": "a {brace} and \\"</tool_call>\\""}}'
ARGUMENTS = '{"at": "a {brace} and \\"</tool_call>\\""}'
ACT = '{"name": "act", "arguments": {}}'

Read = tuple[str, list[tuple[str, str]]]


def read(row: CallFormat, pieces: Sequence[str], *, thought: str = "", most: int | None = None) -> Read:
    """The content, and the name and arguments of each call."""
    reader = CallReader(row.reading({}), NAMES, "answer", thought=thought, most_calls=most)
    heard = [*map(reader.push, pieces), reader.finish()]
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (call for one in heard for call in one.calls):
        assert bool(call.name) == bool(call.call_id) == (call.index not in names), "named once, and first"
        names.setdefault(call.index, call.name)
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(reader.num_calls))
    return "".join(one.content for one in heard), [(names[at], arguments[at]) for at in names]


def in_pieces(text: str, cuts: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])]


def marked(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


READINGS = [
    (HERMES, marked(LOOK), ("", [("look", ARGUMENTS)])),
    (HERMES, f"\n\n{marked(LOOK, ACT)}\n", ("", [("look", ARGUMENTS), ("act", "{}")])),
    (HERMES, f"Let me see.\n{marked(ACT)}\nDone.", ("Let me see.\nDone.", [("act", "{}")])),
    (MISTRAL, f"[TOOL_CALLS] [{LOOK}, {ACT}]", ("", [("look", ARGUMENTS), ("act", "{}")])),
    (MISTRAL, '[TOOL_CALLS][{"name": "act", "arguments": {"a": [1]}, "id": "a}]"}]', ("", [("act", '{"a": [1]}')])),
    (NEMOTRON, f"<TOOLCALL>[{ACT}, {ACT}]</TOOLCALL>", ("", [("act", "{}")] * 2)),
    (LLAMA, ' {"name": "act", "parameters": {"a": {"b": 1}}}', ("", [("act", '{"a": {"b": 1}}')])),
    (LLAMA, f"{ACT}\n{ACT}", ("", [("act", "{}")] * 2)),
]
# Written otherwise than models should, and understood none the less.
FORGIVEN = [
    (HERMES, '<tool_call>{"arguments": {"a": "é"}, "name": "act"}</tool_call>', ("", [("act", '{"a": "\\u00e9"}')])),
    (HERMES, '<tool_call>{"name": "act", "parameters": {"a": 1}}</tool_call>', ("", [("act", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "act", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("act", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "act", "arguments": "\\ud800"}</tool_call>', ("", [("act", "?")])),
    (HERMES, '<tool_call>{"name": "act"}</tool_call>', ("", [("act", "{}")])),
    (HERMES, '<tool_call>{"type": "function", "name": "act"}</tool_call>', ("", [("act", "{}")])),
    (HERMES, '<tool_call>{"name": "act", "arguments": {"a": 1}</tool_call>ok', ("ok", [("act", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "act", "arguments": {"a": 1</tool_call>ok', ("ok", [("act", '{"a": 1')])),
    (HERMES, f"<tool_call>{ACT} ok", (" ok", [("act", "{}")])),
    (HERMES, f"<tool_call>{ACT}</tool_c", ("", [("act", "{}")])),
    (HERMES, '<tool_call>{"name": "act", "arguments": {"a": "half', ("", [("act", '{"a": "half')])),
    (LLAMA, '{"type": "function", "name": "act", "parameters": {}}', ("", [("act", "{}")])),
]
NO_CALLS = [
    (HERMES, "Nothing to call, 1 < 2 and <tool is no mark. "),
    (HERMES, "  "),
    (HERMES, ""),
    (HERMES, "<tool_call>act()</tool_call>"),
    (HERMES, '<tool_call>{"name": "unheard_of", "arguments": {"a": 1}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}, "name": "unheard_of"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "act", "arguments": 7}</tool_call>'),
    (HERMES, '<tool_call>{"name": "act" "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["act"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "act", "argu'),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call>" + '{"name":' * 20_000 + "1" + "}" * 20_000),
    (HERMES, f"<think>I could {marked(ACT)}, but no.</think>\n\nNo."),
    (MISTRAL, f"[TOOL_CALLS] {ACT}"),
    (MISTRAL, "[TOOL_CALLS]"),
    (LLAMA, 'Like this: {"name": "act", "parameters": {}}'),
    (LLAMA, '{"city": "Paris", "name": "act", "parameters": {}}'),
    (LLAMA, '{"name": "act", "parameters": '),
    (LLAMA, '```json\n{"name": "act", "parameters": {}}\n```'),
]


@pytest.mark.parametrize(("row", "text", "expected"), READINGS + FORGIVEN)
def test_calls_are_read(row: CallFormat, text: str, expected: Read) -> None:
    assert read(row, [text]) == read(row, list(text)) == expected


@pytest.mark.parametrize(("row", "text"), NO_CALLS, ids=lambda value: str(value)[:40])
def test_what_is_no_call_is_content_to_the_last_character(row: CallFormat, text: str) -> None:
    assert read(row, [text]) == read(row, in_pieces(text, range(0, len(text), 7))) == (text, [])


def test_a_call_after_one_that_was_none() -> None:
    assert read(HERMES, [f"<tool_call>act! {marked(ACT)}"]) == ("<tool_call>act!", [("act", "{}")])
    assert read(HERMES, [f'<tool_call>{{"name": "{marked(ACT)}']) == ('<tool_call>{"name": "', [("act", "{}")])


def test_calls_come_after_the_thoughts() -> None:
    thoughts = f"I could {marked(LOOK)}."
    assert read(HERMES, [f"<think>{thoughts}</think>\n{marked(ACT)}"]) == (
        f"<think>{thoughts}</think>",
        [("act", "{}")],
    )
    opened = f"{thoughts}</think>{marked(ACT)}"
    assert read(HERMES, list(opened), thought="</think>") == (f"{thoughts}</think>", [("act", "{}")])
    assert read(LLAMA, ['</think>\n{"name": "act"}'], thought="</think>") == ("</think>", [("act", "{}")])


@pytest.mark.parametrize(("row", "text", "_"), READINGS)
def test_after_the_most_calls_nothing_more_is_read(row: CallFormat, text: str, _: Read) -> None:
    content, calls = read(row, [text + "and on"], most=1)
    assert len(calls) == 1
    assert "and on" not in content
    reader = CallReader(row.reading({}), NAMES, "answer", most_calls=1)
    num_read = next(num for num, char in enumerate(text, start=1) if reader.push(char) and reader.is_done)
    assert text[:num_read].rstrip().endswith("}"), "it is done with the call's last bracket"


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(HERMES.reading({}), NAMES, "answer")
    assert reader.push('<tool_call>\n{"name": "look", "arguments":').calls == ()
    (begun,) = reader.push(' {"at": "th').calls
    assert (begun.index, begun.name, begun.arguments) == (0, "look", '{"at": "th')
    (more,) = reader.push('is"').calls
    assert (more.index, more.name, more.call_id, more.arguments) == (0, "", "", 'is"')


def test_ids_name_a_call_of_an_answer() -> None:
    ids = {call_id(seed, index) for seed in ("one", "two") for index in range(50)}
    assert len(ids) == 100
    assert call_id("one", 1) == call_id("one", 1)
    assert all(len(one) == len("call_") + 24 for one in ids)


SCRAPS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<TOOLCALL>", "</TOOLCALL>", "<think>", "</think>", ACT, LOOK]
SCRAPS += [
    '{"name": "act", "arguments": {',
    '{"name": "look',
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    "\\",
    " ",
    "\n",
    "text",
    "<",
]


@given(
    row=st.sampled_from(FORMATS),
    text=st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join),
    cuts=st.data(),
    most=st.sampled_from([None, 1]),
)
def test_it_does_not_matter_how_the_text_is_cut(
    row: CallFormat, text: str, cuts: st.DataObject, most: int | None
) -> None:
    whole = read(row, [text], most=most)
    places = cuts.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert read(row, in_pieces(text, places), most=most) == whole
    assert read(row, list(text), most=most) == whole


@given(row=st.sampled_from(FORMATS), text=st.text(alphabet='<>/[]{}":, \nTOL_CAtolcai', max_size=60))
@example(HERMES, "<tool_call><tool_call>")
def test_nothing_is_lost_where_nothing_is_called(row: CallFormat, text: str) -> None:
    assert read(row, list(text)) == (text, [])


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.integers() | st.text(max_size=9), st.lists, max_leaves=4)),
    st.booleans(),
)
def test_any_arguments_come_out_as_the_json_they_are(arguments: dict[str, object], is_ascii: bool) -> None:
    text = json.dumps(arguments, ensure_ascii=is_ascii)
    assert read(HERMES, list(marked(f'{{"name": "act", "arguments": {text}}}'))) == ("", [("act", text)])
