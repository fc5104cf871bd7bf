"""The parts of a chat request that are about tools: what may be called, what must be, and what was called before.

Knows one body at a time. Whether names and ids refer to something is checked here too; how a model is told is
`prompt.py`'s, and what it is held to is `held.py`'s. Limits are those of OpenAI's published schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from packlight.router.parts import Part, fault

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Part):
    """`parameters` is a JSON schema of an object; without it the function has none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if (self.parameters or {}).get("type", "object") != "object":
            raise fault("invalid_value", "Expected a schema whose 'type' is 'object'.", ".parameters")
        return self


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: FunctionName


class ToolChoice(Part):
    """`function` names the one that must be called, and is there for that type only."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def _has_its_function(self) -> Self:
        if self.type == "function" and self.function is None:
            raise fault("missing_required_parameter", "The type 'function' needs it.", ".function")
        return self

    def allows(self, tool: Tool) -> bool:
        return self.function is None or self.function.name == tool.function.name


class CalledFunction(Part):
    """`arguments` is what the model wrote: JSON, if it did well."""

    name: str
    arguments: str


class ToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def as_choice(choice: Any) -> Any:
    """A plain word means itself; an object names a function."""
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise fault("invalid_value", "Supported values are: 'none', 'auto', 'required' and an object.")
        return {"type": choice}
    if isinstance(choice, dict) and choice.get("type") != "function":
        raise fault("invalid_value", "Supported values are: 'function'.", ".type")
    return choice


def check_names(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raises what validators raise, for names that are given twice and for a choice that there is not."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise fault("invalid_value", "Another tool has this name.", f"tools[{index}].function.name")
        names.add(tool.function.name)
    if choice is None or choice.type == "none":
        return
    if not tools:
        raise fault("invalid_value", "It is only allowed when 'tools' are given.", "tool_choice")
    if choice.function is not None and choice.function.name not in names:
        raise fault("invalid_value", "None of 'tools' has this name.", "tool_choice.function.name")


def check_ids(messages: Sequence[tuple[Sequence[ToolCall], str | None]]) -> None:
    """The calls of each message, and the id of the call whose result it is. Raises what validators raise, for a result
    without a call."""
    called: set[str] = set()
    for index, (calls, answered) in enumerate(messages):
        if answered is not None and answered not in called:
            problem = "No message before it has a call with this id in 'tool_calls'."
            raise fault("invalid_value", problem, f"messages[{index}].tool_call_id")
        called.update(call.id for call in calls)
