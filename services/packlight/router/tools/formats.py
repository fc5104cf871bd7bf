"""How models write their calls: one row per way, and which row a model's chat template uses.

Knows what stands around a call's JSON. Which way is a model's is found out by asking its template: it is shown a
conversation with a call in it, and the row is the model's that reads that very call from what the template wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.core.errors import InvalidRequest
from packlight.router.service import Tokenizer
from packlight.router.tools.reader import CallReader, Reading


@dataclass(frozen=True, slots=True)
class CallFormat:
    """`opening` and `closing` are the marks around a call, or around a JSON list of calls. A model without an opening
    mark calls when its answer begins with `{`.

    `arguments` is the key of a call's arguments; `layout` is written before and after the JSON of a call that has marks
    of its own, `between` between two calls. A model without limit has no `num_calls` at once, and one that takes any id
    no `id_chars`."""

    name: str
    opening: str = ""
    closing: str = ""
    arguments: str = "arguments"
    is_list: bool = False
    layout: tuple[str, str] = ("", "")
    between: str = ", "
    num_calls: int | None = None
    id_chars: int | None = None

    def reading(self, marks: Mapping[int, str]) -> Reading:
        return Reading(self.opening, self.closing, self.is_list, marks)


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>", layout=("\n", "\n"), between="\n")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", is_list=True, id_chars=9)
# Its template refuses a conversation in which two calls were made at once.
LLAMA = CallFormat("llama", arguments="parameters", num_calls=1)
NEMOTRON = CallFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>", is_list=True)
FORMATS = (HERMES, MISTRAL, NEMOTRON, LLAMA)

_QUESTION = {"role": "user", "content": "Why?"}
_NAME, _ARGUMENTS, _ID = "look_up", {"word": "because"}, "a1b2c3d4e"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "The word."}}},
    },
}
_CALL = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "Because.", "tool_call_id": _ID, "name": _NAME}


def format_of(tokenizer: Tokenizer) -> CallFormat | None:
    """The row that the chat template writes calls in. None where it knows no tools, or writes them otherwise."""
    asked = _tokens(tokenizer, [_QUESTION], tools=[_TOOL])
    if asked is None or asked == _tokens(tokenizer, [_QUESTION]):
        return None
    whole = _tokens(tokenizer, [_QUESTION, _CALLED, _RESULT], tools=[_TOOL], add_generation_prompt=False)
    if whole is None:
        return None
    answer = whole[_num_shared(asked, whole) :]
    # Marks are found wherever they are. An answer may begin otherwise than it is asked for: with no thoughts.
    return next((row for row in FORMATS if _reads(row, whole if row.opening else answer, tokenizer)), None)


def knows_system(tokenizer: Tokenizer) -> bool:
    """Whether the chat template takes a system message."""
    return _tokens(tokenizer, [{"role": "system", "content": "Be brief."}, _QUESTION]) is not None


def marks_of(row: CallFormat, tokenizer: Tokenizer) -> dict[int, str]:
    """The marks that are special tokens of the model, which have no text of their own."""
    found = {}
    for mark in filter(None, (row.opening, row.closing)):
        token_ids = tokenizer.encode(mark)
        if len(token_ids) == 1 and tokenizer.is_special(token_ids[0]):
            found[token_ids[0]] = mark
    return found


def _reads(row: CallFormat, token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    marks = marks_of(row, tokenizer)
    spelled = [marks[token].encode() if token in marks else tokenizer.token_bytes(token) for token in token_ids]
    reader = CallReader(row.reading(marks), (_NAME,), _ID)
    text = b"".join(spelled).decode(errors="replace")
    heard = [*reader.push(text).calls, *reader.finish().calls]
    wanted = '{"word":"because"}'
    return bool(heard) and "".join(call.arguments for call in heard).replace(" ", "") == wanted


def _tokens(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int] | None:
    """None where the template refuses such a conversation."""
    try:
        return tokenizer.apply_chat_template(messages, **{"add_generation_prompt": True, **options})
    except InvalidRequest:
        return None


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
