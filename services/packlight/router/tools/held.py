"""The grammar that calls are held to: from the first token where there must be one, from the opening mark otherwise.

Knows how calls are written (`formats.py`) and composes that with the schemas of their arguments. How a grammar is
followed is `models/grammar.py`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.models.grammar import json_of, lark_grammar, literal, special_token
from packlight.router.thinking import THOUGHT_TAGS
from packlight.router.tools.formats import CallFormat
from packlight.router.tools.schema import Tool

_ANY_TEXT = r"TEXT: /(.|\n)*/"
# Where calls have no opening mark, an answer that is no call begins with anything else than an object.
_NO_OBJECT = r"TEXT: /(\s*[^{\s](.|\n)*)?/"
_GAP = r'("\n" "\n"?)?'
# What makes a schema's own properties not all there are.
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Of calls to `tools`, at most `num_calls` at once. `marks` are the special tokens among those of `row`."""

    row: CallFormat
    marks: Mapping[int, str]
    tools: Sequence[Tool]
    num_calls: int

    def required(self, thought: str, *, may_think: bool) -> str:
        """Calls and nothing else, after the thoughts. `thought` is the tag that ends those which the prompt opens."""
        opened, closed = THOUGHT_TAGS[0]
        before = f"thought {_GAP}" if thought else f"({literal(opened)} thought {_GAP})?" if may_think else ""
        return self._written(f"{before} calls", thought or closed, _ANY_TEXT)

    def optional(self, thought: str) -> str:
        """Text, in which calls are held to what they must be, after the thoughts."""
        before = f"thought {_GAP}" if thought else ""
        if not self.row.opening:
            return self._written(f"{before} (calls | TEXT)", thought, _NO_OBJECT)
        answer = "(TEXT | head rest)" if self.num_calls == 1 else "(head rest)* TEXT"
        return self._written(f"{before} {answer}", thought, _ANY_TEXT)

    def _written(self, start: str, thought: str, text: str) -> str:
        bodies = [f"f{index}: {self._body(tool)}" for index, tool in enumerate(self.tools)]
        body = f"body: {' | '.join(f'f{index}' for index in range(len(bodies)))}"
        thoughts = [_lazy("thought", literal(thought))] if "thought" in start else []
        return lark_grammar("\n".join([f"start: {start.strip()}", *thoughts, *self._calls(), body, *bodies, text]))

    def _calls(self) -> list[str]:
        opening, closing = self._mark(self.row.opening), self._mark(self.row.closing)
        if self.row.is_list:
            calls, bodies = "call", f'" "? "[" body {self._more("body")} "]"'
        else:
            before, after = map(_given, self.row.layout)
            calls, bodies = f"call {self._more('call')}", f"{before} body {after}"
        head = [_lazy("head", opening)] if self.row.opening else []
        return [f"calls: {calls}", f"call: {opening} rest", f"rest: {bodies} {closing}", *head]

    def _more(self, rule: str) -> str:
        return f"({literal(self.row.between)} {rule}){{0,{self.num_calls - 1}}}" if self.num_calls > 1 else ""

    def _mark(self, mark: str) -> str:
        token_id = next((token_id for token_id, text in self.marks.items() if text == mark), None)
        return _given(mark) if token_id is None else special_token(token_id)

    def _body(self, tool: Tool) -> str:
        head = f'{{"name": {literal(tool.function.name)}, "{self.row.arguments}": '
        schema = json_of(arguments_schema(tool), is_lenient=not tool.function.strict)
        return f"{literal(head)} {schema} {literal('}')}"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Of an object that has no other properties than those named, unless the schema says something about others: a
    function cannot take what it does not know."""
    schema = {"type": "object", **(tool.function.parameters or {"properties": {}})}
    return schema if any(key in schema for key in _OPEN) else {**schema, "additionalProperties": False}


def _lazy(name: str, mark: str) -> str:
    """A rule for any text up to the first such mark. A special token cannot be part of a text."""
    return f"{name}: TEXT {mark}" if mark.startswith("<[") else f"{name}[lazy]: TEXT {mark}"


def _given(text: str) -> str:
    return literal(text) if text else ""
