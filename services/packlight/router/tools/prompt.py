"""How a conversation with tools becomes what a chat template is given.

Knows two ways. A template that writes calls in a way we read (`formats.py`) gets the tools and the calls as they are.
Any other model is told in words: the tools, and how to call them, stand in the system prompt, and calls and results
become ordinary turns. Tools keep the order and the keys that the client gave them, so the same tools are the same
tokens, and a cached prefix stays one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from packlight.router.schema import Message
from packlight.router.tools.formats import CallFormat
from packlight.router.tools.schema import Tool, ToolCall

Shown = dict[str, Any]

_NOTHING = {"type": "object", "properties": {}}
# Tried with SmolLM2, which repeats its call when it is told less plainly.
_NOW = "Now answer in your own words."


def described(tool: Tool) -> Shown:
    """As chat templates expect a tool. Whether it is strict is no business of the model's."""
    function = tool.function
    told = {"name": function.name, "description": function.description or "", "parameters": function.parameters}
    return {"type": "function", "function": told | ({} if function.parameters else {"parameters": _NOTHING})}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def natively(messages: Sequence[Message], row: CallFormat | None) -> list[Shown]:
    """Messages as a template expects them that knows calls, if there are any. Templates of open models know the
    developer as `system`, and want a call's arguments as an object."""
    return [_native(message, row.id_chars if row else None) for message in messages]


def in_words(
    messages: Sequence[Message], tools: Sequence[Tool], row: CallFormat, *, speaker: str = "system"
) -> list[Shown]:
    """The same for a template that knows system, user and assistant only, told by the first of them that it knows: the
    `speaker`. It is told of calls in the form of `row`."""
    called = {call.id: call.function.name for message in messages for call in message.tool_calls}
    turns: list[Shown] = []
    after_result = False
    for message in messages:
        is_result = message.role == "tool"
        turn = _result(message, called) if is_result else _in_words(message, row)
        if after_result and turn["role"] == "user":
            # Results, and what the user says to them, are one turn: templates want roles to alternate.
            turns[-1] |= {"content": f"{turns[-1]['content'].removesuffix(_NOW)}{turn['content']}"}
        else:
            turns.append(turn)
        after_result = is_result or (after_result and turn["role"] == "user")
    return _with_first(turns, speaker, _told(tools, row)) if tools else turns


def _native(message: Message, id_chars: int | None) -> Shown:
    shown = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    if message.role == "developer":
        shown["role"] = "system"
    if message.tool_call_id is not None:
        shown["tool_call_id"] = _short(message.tool_call_id, id_chars)
    if message.tool_calls:
        shown.setdefault("content", "")
        shown["tool_calls"] = [_native_call(call, id_chars) for call in message.tool_calls]
    return shown


def _native_call(call: ToolCall, id_chars: int | None) -> Shown:
    called = {"name": call.function.name, "arguments": _arguments(call)}
    return {"id": _short(call.id, id_chars), "type": "function", "function": called}


def _arguments(call: ToolCall) -> Any:
    """An object, or the text as it is: a model that wrote something else may see what it wrote."""
    try:
        found = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        return call.function.arguments
    return found if isinstance(found, Mapping) else call.function.arguments


def _short(call_id: str, num_chars: int | None) -> str:
    """The id in the length that some templates insist on; the same for the call and its result."""
    if num_chars is None or re.fullmatch(f"[A-Za-z0-9]{{{num_chars}}}", call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(errors="replace"), digest_size=16).hexdigest()[:num_chars]


def _told(tools: Sequence[Tool], row: CallFormat) -> str:
    return "\n".join(
        [
            "You can call functions. These are the ones you have, each with the JSON schema of its parameters:",
            *(as_json(described(tool)["function"]) for tool in tools),
            "To call one, write this and nothing after it:",
            _written("FUNCTION", {"PARAMETER": "VALUE"}, row),
            "You will be told the result. Where no function helps, answer in your own words.",
        ]
    )


def _result(message: Message, called: Mapping[str, str]) -> Shown:
    name = called.get(message.tool_call_id or "", "The function")
    return {"role": "user", "content": f"{name} returned this:\n{message.content}\n\n{_NOW}"}


def _in_words(message: Message, row: CallFormat) -> Shown:
    shown: Shown = {"role": "system" if message.role == "developer" else message.role, "content": message.content or ""}
    if message.tool_calls:
        calls = [_written(call.function.name, _arguments(call), row) for call in message.tool_calls]
        shown["content"] = "\n".join(filter(None, [message.content, *calls]))
    return shown | ({} if message.name is None else {"name": message.name})


def _written(name: str, arguments: Any, row: CallFormat) -> str:
    before, after = row.layout
    return f"{row.opening}{before}{as_json({'name': name, row.arguments: arguments})}{after}{row.closing}"


def _with_first(turns: Sequence[Shown], speaker: str, told: str) -> list[Shown]:
    first = turns[0]
    if first["role"] != speaker:
        return [{"role": speaker, "content": told}, *turns]
    parts = [first["content"], told] if speaker == "system" else [told, first["content"]]
    return [{**first, "content": "\n\n".join(parts)}, *turns[1:]]
