"""The request bodies of the OpenAI API, as far as they are served: fields, types, limits, defaults.

Knows one body at a time. What depends on the model (vocabulary, context length) is checked in `params.py` and
`job.py`; what is refused or ignored by name is listed in `validate.py`. Limits are those of OpenAI's published
schema (version 2.3.0); fields below "extensions" are the ones self-hosted servers share.

`null` means "not given" everywhere: it is removed before these models see the body.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, model_validator

from packlight.models.schema_bounds import MAX_PATTERN_CHARS
from packlight.router.parts import Part, fault
from packlight.router.tools.schema import MAX_TOOLS, Tool, ToolCall, ToolChoice, as_choice, check_ids, check_names
from packlight.router.wording import PRINTABLE_NAME

Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0)]
# Each is added by itself, at every token.
MAX_BIASES = 1024
# The option of the `kv` object that asks for a report and not for a packing.
_EXPLAIN = "explain"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(content: Any) -> Any:
    """Content as one string: text parts are joined by newlines. Other kinds of parts need another model."""
    if not isinstance(content, list):
        return content
    return "\n".join(_part_text(part, f"[{index}]") for index, part in enumerate(content))


def _plain_options(options: Any) -> Any:
    """Only plain names and short scalars, so that an error about an option can say them."""
    for name, value in options.items() if isinstance(options, dict) else ():
        if not PRINTABLE_NAME.fullmatch(name):
            raise fault("unknown_parameter", "It has an option that does not exist.")
        if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and len(value) > 64):
            raise fault("invalid_type", "Expected a number or a short string.", name)
        if name == _EXPLAIN and not isinstance(value, bool):
            raise fault("invalid_type", "Expected a boolean.", name)
    return options


def _text_or_list(prompt: Any) -> Any:
    if not isinstance(prompt, str | list):
        raise fault("invalid_type", "Expected a string or an array.")
    return prompt


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise fault("unsupported_value", "This model reads content parts of type 'text' only.", path)
    if not isinstance(part.get(kind), str):
        raise fault(
            "invalid_type", f"A content part of type '{kind}' must have a string in '{kind}'.", f"{path}.{kind}"
        )
    text: str = part[kind]
    return text


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024)]],
    Field(max_length=4),
    FailFast(),
    BeforeValidator(_as_list),
]
ToolCalls = Annotated[
    list[ToolCall],
    Field(max_length=MAX_TOOLS),
    FailFast(),
    BeforeValidator(lambda calls: calls or []),
]


class Message(Part):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_as_text, json_schema_input_type=str | list[Any])] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: ToolCalls = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise fault("missing_required_parameter", "A message must have content.", ".content")
        if self.role == "tool" and self.tool_call_id is None:
            raise fault("missing_required_parameter", "A message with role 'tool' must have it.", ".tool_call_id")
        return self


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class TemplateOptions(Part):
    """The variables of a chat template that a client may set; no template needs others to render."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None


class JsonSchema(Part):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    wanted: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    misplaced: Any = Field(alias="schema", default=None)  # where some servers expect it

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise fault("missing_required_parameter", "The type 'json_schema' needs it.", ".json_schema")
        if self.type == "text" and self.json_schema is not None:
            raise fault("invalid_value", "It is only allowed with the type 'json_schema'.", ".json_schema")
        if self.misplaced is not None:
            place = "Put it into 'json_schema.schema', with the type 'json_schema'."
            raise fault("unsupported_parameter", place, ".schema")
        return self


class StructuredOutputs(Part):
    """vLLM's names for the same, and for two kinds of answers that OpenAI has no name for: exactly one is given."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(field is not None for field in (self.json_, self.regex, self.choice)) != 1:
            raise fault("invalid_value", "Expected exactly one of 'json', 'regex' and 'choice'.")
        return self


class CacheOptions(Part):
    mode: Literal["implicit", "explicit"] = "implicit"


class Body(Part):
    """What both kinds of completions share."""

    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Count | None = None
    stop: Stops = Field(default_factory=list)
    seed: Int64 | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] = Field(
        default_factory=dict
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_cache_options: CacheOptions = CacheOptions()

    # Extensions.
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # beyond, logits are no numbers any more
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128), FailFast()] = Field(default_factory=list)
    cache_salt: Annotated[str, Field(max_length=128, pattern=r"^[^@/\\\x00]*$")] = ""
    kv: Annotated[dict[str, Any], BeforeValidator(_plain_options)] = Field(default_factory=dict)
    response_format: ResponseFormat = ResponseFormat(type="text")  # of OpenAI's only chats have it
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault("invalid_value", "It is only allowed when 'stream' is true.", "stream_options")
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            raise fault(
                "invalid_value", f"Expected at most {self.max_new_tokens}, the most tokens asked for.", "min_tokens"
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def packing(self) -> dict[str, Any]:
        """The options of `kv` that say how to pack."""
        return {name: value for name, value in self.kv.items() if name != _EXPLAIN}

    @property
    def explain(self) -> bool:
        """Whether the answer shall say which parts of the prompt were kept."""
        return bool(self.kv.get(_EXPLAIN, False))

    @property
    def num_logprobs(self) -> int | None:
        """As in `SamplingParams`: None for no log-probabilities, else how many alternatives."""
        raise NotImplementedError


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()] = Field(default_factory=list)
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(as_choice)] = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _refers_to_what_there_is(self) -> Self:
        check_names(self.tools, self.tool_choice)
        check_ids([(one.tool_calls, one.tool_call_id if one.role == "tool" else None) for one in self.messages])
        return self

    @model_validator(mode="after")
    def _wants_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("invalid_value", "It is only allowed when 'logprobs' is true.", "top_logprobs")
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the model is told of: with the choice `none` it is as if there were none."""
        return [] if self.tool_choice is not None and self.tool_choice.type == "none" else self.tools

    @property
    def template_options(self) -> dict[str, Any]:
        """The variables of the chat template that are set; `chat_template_kwargs` have the last word."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs.model_dump(exclude_none=True)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """`prompt` is a string, a list of strings, a list of tokens or a list of lists of tokens."""

    prompt: Annotated[str | list[Any], BeforeValidator(_text_or_list)]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
