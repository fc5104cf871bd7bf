"""One model's tools: what its prompts are told of them, and what its answers are held to and read by.

Knows which way of writing calls is the model's, and what each `tool_choice` means. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packlight.core.errors import InvalidRequest
from packlight.core.types import ModelSpec
from packlight.models.grammar import check_grammar, json_grammar
from packlight.router.formats import refusal, refuse_contradictions
from packlight.router.schema import ChatBody, Message
from packlight.router.service import Tokenizer
from packlight.router.thinking import open_thought
from packlight.router.tools.formats import HERMES, format_of, knows_system, marks_of
from packlight.router.tools.held import CallGrammar, arguments_schema
from packlight.router.tools.prompt import as_json, described, in_words, natively
from packlight.router.tools.reader import CallReader, Reading
from packlight.router.tools.schema import Tool

# How many calls at once a grammar allows: a small model that may go on calling does.
MAX_CALLS = 8


@dataclass(frozen=True, slots=True)
class CallRules:
    """Of one answer. `grammar` as in `SamplingParams`, empty where calls are not held to anything; `loosened` says what
    of their schemas they are not held to. After `most_calls` the answer ends."""

    reading: Reading
    names: frozenset[str]
    grammar: str = ""
    loosened: tuple[str, ...] = ()
    thought: str = ""
    most_calls: int | None = None

    def reader(self, seed: str) -> CallReader:
        """`seed` is the name of one answer."""
        return CallReader(self.reading, self.names, seed, thought=self.thought, most_calls=self.most_calls)


class ModelTools:
    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        """Asks the chat template, which takes milliseconds."""
        self._tokenizer, self._spec = tokenizer, spec
        self._native = format_of(tokenizer)
        self._row = self._native or HERMES
        self._marks = marks_of(self._row, tokenizer)
        self._speaker = "system" if knows_system(tokenizer) else "user"

    def shown(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What the chat template is given: messages, and options."""
        has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
        if self._native is None and (tools or has_calls):
            return in_words(messages, tools, self._row, speaker=self._speaker), {}
        return natively(messages, self._native), {"tools": [described(tool) for tool in tools]} if tools else {}

    def rules(self, body: ChatBody, token_ids: Sequence[int], *, is_reasoning: bool) -> CallRules | None:
        """For the answer to the prompt `token_ids`. None where nothing may be called. Raises InvalidRequest for schemas
        that cannot be held to, and for wishes that contradict them."""
        if not body.usable_tools:
            return None
        _refuse_format(body)
        thought = open_thought(token_ids, self._tokenizer)
        grammar, loosened = self._held(body, thought, is_reasoning)
        names = frozenset(tool.function.name for tool in body.usable_tools)
        most = None if grammar or body.parallel_tool_calls else 1
        return CallRules(self._row.reading(self._marks), names, grammar, loosened, thought, most)

    def _held(self, body: ChatBody, thought: str, is_reasoning: bool) -> tuple[str, tuple[str, ...]]:
        tools = body.usable_tools
        must = body.tool_choice is not None and body.tool_choice.type != "auto"
        if not must and not any(tool.function.strict for tool in tools):
            return "", ()
        refuse_contradictions(body, self._spec, "tool_choice" if must else "tools", is_reasoning=False)
        callable_now = [tool for tool in tools if body.tool_choice is None or body.tool_choice.allows(tool)]
        composed = CallGrammar(self._row, self._marks, callable_now, self._num_calls(body))
        try:
            grammar = composed.required(thought, may_think=is_reasoning) if must else composed.optional(thought)
            return grammar, tuple(check_grammar(grammar))
        except InvalidRequest as error:
            _blame(tools)
            raise refusal(f"Invalid 'tools': {error.message}", "tools") from None

    def _num_calls(self, body: ChatBody) -> int:
        is_one = not body.parallel_tool_calls or (body.tool_choice is not None and body.tool_choice.type == "function")
        return 1 if is_one else self._row.num_calls or MAX_CALLS


def told_of(tools: Sequence[Tool]) -> str:
    """Everything that a prompt says of tools, as one text."""
    return as_json([described(tool) for tool in tools]) if tools else ""


def _blame(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequest for the first tool whose schema cannot be held to by itself."""
    for index, tool in enumerate(tools):
        param = f"tools[{index}].function.parameters"
        try:
            check_grammar(json_grammar(arguments_schema(tool), is_lenient=not tool.function.strict))
        except InvalidRequest as error:
            raise refusal(f"Invalid '{param}': {error.message}", param) from None


def _refuse_format(body: ChatBody) -> None:
    for name, is_given in (
        ("response_format", body.response_format.type != "text"),
        ("structured_outputs", body.structured_outputs is not None),
    ):
        if is_given:
            raise refusal(
                f"'{name}' cannot be combined with 'tools' that may be called: set 'tool_choice' to 'none' for the "
                "answer that shall have the format.",
                name,
            )
