"""Where a JSON object ends, in a text that arrives character by character.

Knows brackets, strings and which characters JSON can have outside of strings. It does not parse: what it passes may
still be wrong in finer ways.
"""

from __future__ import annotations

from enum import Enum, auto

_BARE = frozenset(" \t\r\n,:0123456789+-.eE" + "truefalsn")


class Place(Enum):
    """Where the text is after a character."""

    BEFORE = auto()
    INSIDE = auto()
    END = auto()
    NOT_JSON = auto()


class Nesting:
    """Follows one object. `depth` is how many brackets are open when it begins to."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._is_escaped = False

    def feed(self, char: str) -> Place:
        """Not to be called again after END. A character that is not JSON is passed over."""
        if self._in_string:
            self._feed_string(char)
            return Place.INSIDE
        if self._depth == 0:
            return self._begin(char)
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return Place.INSIDE if self._depth else Place.END
        elif char not in _BARE:
            return Place.NOT_JSON
        return Place.INSIDE

    def _begin(self, char: str) -> Place:
        if char == "{":
            self._depth = 1
            return Place.INSIDE
        return Place.BEFORE if char.isspace() else Place.NOT_JSON

    def _feed_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
