"""A call: what is told of it while it is written, and the JSON that it is written in.

Knows the two ways in which models name a call's arguments. Does not know what stands around calls.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

_KEYS = ("arguments", "parameters")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
# The first key tells a call from any other object, for models that write nothing before it.
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')
_CALL_KEYS = frozenset({"name", "type", "id", "function", *_KEYS})


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is added to call `index`. The first delta of a call has its id and name."""

    index: int
    arguments: str = ""
    call_id: str = ""
    name: str = ""

    def followed_by(self, more: CallDelta) -> CallDelta:
        return replace(self, arguments=self.arguments + more.arguments)


@dataclass(frozen=True, slots=True)
class Heard:
    content: str = ""
    calls: tuple[CallDelta, ...] = ()


def call_id(seed: str, index: int) -> str:
    """The same for the same call of the same answer, whoever reads it."""
    return "call_" + hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=12).hexdigest()


def parsed_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """The name and the arguments of a call, written as one object. None for one that is no call of these functions."""
    try:
        call: dict[str, Any] = json.loads(text)
        name = call.get("name")
        arguments: Any = next((call[key] for key in _KEYS if key in call), {})
        written = _as_text(arguments)
    except (ValueError, RecursionError):
        return None
    return (name, written) if isinstance(name, str) and name in names and written is not None else None


def _as_text(arguments: Any) -> str | None:
    if isinstance(arguments, str):
        # Half of a surrogate pair can be written in JSON, and not in UTF-8.
        return arguments.encode(errors="replace").decode()
    return json.dumps(arguments) if isinstance(arguments, dict) else None


def begun_call(text: str) -> tuple[str, int] | None:
    """The name in a call's head, and where its arguments begin. None as long as they do not, and where the name is not
    what comes first."""
    match = _HEAD.match(text)
    return (match[1], match.end()) if match else None


def is_another_object(text: str) -> bool:
    """Whether its first key shows that an object is no call."""
    first = _FIRST_KEY.match(text)
    return first is not None and first[1] not in _CALL_KEYS
