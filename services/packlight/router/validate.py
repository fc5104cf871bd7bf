"""From the bytes of a request to its typed body, or to the one error the client should fix first.

Knows which fields are refused by name: those that ask for something this server cannot do, so that no constraint is
ever dropped silently. Other unknown fields are ignored, and named in a `warning` header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from packlight.core.errors import InvalidRequest
from packlight.router.schema import Body
from packlight.router.wording import PRINTABLE_NAME, explain, type_name

B = TypeVar("B", bound=Body)

# A body of 8 MiB can hold millions of empty arrays, and building each costs a hundred times its two bytes. No
# conversation has this many brackets, inside strings or outside.
MAX_BRACKETS = 100_000

# Fields that constrain the answer, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "json_schema": (),
    "regex": (),
    "stop_regex": ([], ""),
    "no_stop_trim": (False,),
    "ebnf": (),
    "grammar": (),
    "structural_tag": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "kv_transfer_params": (),
    "chat_template": (),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "min_new_tokens": (0,),
    "thinking_token_budget": (),
}
_UNSUPPORTED_PREFIX = "guided_"

# Fields of OpenAI's that are hints, or that concern records this server does not keep.
_ACCEPTED = frozenset(
    {
        "user",
        "safety_identifier",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "service_tier",
        "store",
        "parallel_tool_calls",
    }
)
_MAX_NAMED = 8
_MAX_WARNING_CHARS = 200


def read_request(data: bytes, body_type: type[B]) -> tuple[B, list[str]]:
    """The body, and the names of the fields that were ignored. Raises InvalidRequest."""
    fields = _without_nulls(_parse(data))
    _refuse_unsupported(fields, body_type)
    try:
        body = body_type.model_validate(fields)
    except ValidationError as error:
        raise explain(error.errors(include_url=False)[0]) from None
    known = (body_type.model_fields, _ACCEPTED, _UNSUPPORTED)
    return body, [name for name in fields if not any(name in names for names in known)]


def warning_header(ignored: Sequence[str], loosened: Sequence[str] = ()) -> dict[str, str]:
    """RFC 9111's `warning`, naming what was ignored, and what of a schema is not held to, as far as a header can."""
    warnings = [_ignored_fields(ignored)] if ignored else []
    if loosened:
        warnings.append(f"the answer is not held to all of its schema: {_in_header('; '.join(loosened))}")
    return {"warning": ", ".join(f'299 packlight "{text}"' for text in warnings)} if warnings else {}


def _ignored_fields(ignored: Sequence[str]) -> str:
    names = [name for name in ignored if PRINTABLE_NAME.fullmatch(name)][:_MAX_NAMED]
    unnamed = f" and {len(ignored) - len(names)} more" if len(ignored) > len(names) else ""
    return f"ignored unknown parameters: {', '.join(names)}{unnamed}"


def _in_header(text: str) -> str:
    """Only what a quoted string of a header may hold: a schema's keys are a stranger's."""
    plain = "".join(character if character.isascii() and character.isprintable() else "?" for character in text)
    return plain.replace("\\", "?").replace('"', "'")[:_MAX_WARNING_CHARS]


def _parse(data: bytes) -> dict[str, Any]:
    # Few bodies are so long that they could have so many; counting is as slow as parsing.
    if len(data) > MAX_BRACKETS and data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise InvalidRequest(f"The body has more than {MAX_BRACKETS} brackets.", code="invalid_json")
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        # The parser's message is a reason and a position, never the text itself.
        raise InvalidRequest(
            f"We could not parse the JSON body of your request: {error}.", code="invalid_json"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequest(
            f"Invalid type for the body: expected an object, but got {type_name(fields)} instead.", code="invalid_type"
        )
    return fields


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """`null` means "not given", in the body and in the objects directly in it."""
    given = {name: value for name, value in fields.items() if value is not None}
    return {
        name: {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
        for name, value in given.items()
    }


def _refuse_unsupported(fields: dict[str, Any], body_type: type[Body]) -> None:
    for name, value in fields.items():
        if name in body_type.model_fields:
            continue
        asks_nothing = _UNSUPPORTED.get(name, () if name.startswith(_UNSUPPORTED_PREFIX) else None)
        if asks_nothing is not None and value not in asks_nothing:
            shown = name if name in _UNSUPPORTED or PRINTABLE_NAME.fullmatch(name) else _UNSUPPORTED_PREFIX + "*"
            raise InvalidRequest(
                f"Unsupported parameter: '{shown}' is not supported by this server with this value. Remove it.",
                param=shown,
                code="unsupported_parameter",
            )
