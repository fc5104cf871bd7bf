"""Pydantic's findings in OpenAI's words.

Knows error texts, `param` paths and codes; frameworks match on all three. Does not know which fields exist. Values sent
by the client are not repeated, except numbers, and names only where they are short and plain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from packlight.core.errors import InvalidRequest

PRINTABLE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LIMITS: Mapping[str, tuple[str, str, str]] = {
    "less_than_equal": ("le", "above maximum", "<="),
    "less_than": ("lt", "above maximum", "<"),
    "greater_than_equal": ("ge", "below minimum", ">="),
    "greater_than": ("gt", "below minimum", ">"),
}
_EXPECTED: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "string_type": "a string",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def explain(detail: ErrorDetails) -> InvalidRequest:
    """Pydantic's first finding in OpenAI's words."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    path = _path(detail["loc"], context.get("path", ""))
    if "text" in context:
        return InvalidRequest(f"Invalid '{path}': {context['text']}", param=path, code=kind)
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unsupported parameter: '{path}'.", param=path, code="unsupported_parameter")
    for part in (_explain_range, _explain_size, _explain_value):
        if found := part(kind, context, value):
            code, text = found
            return InvalidRequest(f"Invalid '{path}': {text}", param=path, code=code)
    expected = _EXPECTED.get(kind, "another type")
    return InvalidRequest(
        f"Invalid type for '{path}': expected {expected}, but got {type_name(value)} instead.",
        param=path,
        code="invalid_type",
    )


def _explain_range(kind: str, context: dict[str, Any], value: Any) -> tuple[str, str] | None:
    if kind not in _LIMITS:
        return None
    key, where, sign = _LIMITS[kind]
    # The limit has the type of the field, whatever the client sent.
    number = "integer" if isinstance(context[key], int) else "decimal"
    code = f"{number}_{where.replace(' ', '_').replace('maximum', 'max').replace('minimum', 'min')}_value"
    return code, f"{number} {where} value. Expected a value {sign} {context[key]:g}, but got {_number(value)} instead."


def _explain_size(kind: str, context: dict[str, Any], value: Any) -> tuple[str, str] | None:
    match kind:
        case "too_short":
            least = context["min_length"]
            return "empty_array", f"empty array. Expected an array with minimum length {least}, but got an empty array."
        case "too_long" if isinstance(value, dict):
            wanted = f"Expected an object with at most {context['max_length']} properties"
            return "object_above_max_properties", f"object too large. {wanted}, but got {len(value)} instead."
        case "too_long":
            wanted = f"Expected an array with maximum length {context['max_length']}"
            return (
                "array_above_max_length",
                f"array too long. {wanted}, but got an array with length {len(value)} instead.",
            )
        case "string_too_short":
            return (
                "empty_string",
                "empty string. Expected a string with minimum length 1, but got an empty string instead.",
            )
        case "string_too_long":
            wanted = f"Expected a string with maximum length {context['max_length']}"
            return "string_above_max_length", f"string too long. {wanted}, but got a longer one instead."
    return None


def _explain_value(kind: str, context: dict[str, Any], _: Any) -> tuple[str, str] | None:
    match kind:
        case "literal_error":
            return "invalid_value", f"invalid value. Supported values are: {context['expected']}."
        case "finite_number":
            return "invalid_value", "expected a finite number."
        case "string_pattern_mismatch":
            return "invalid_value", "it has characters that are not allowed."
    return None


def _path(location: tuple[int | str, ...], below: str) -> str:
    steps = [step for step in location if isinstance(step, int) or PRINTABLE_NAME.fullmatch(step)]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if below and path and below[0] not in ".[":
        return f"{path}.{below}"
    return path + below


def type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _number(value: int | float) -> str:
    return f"{value}" if isinstance(value, float) or abs(value) < 10**20 else "a much larger one"
