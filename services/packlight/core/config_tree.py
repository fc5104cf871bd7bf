"""From a plain tree to the typed configuration: overrides applied, values checked, errors that name the setting.

Knows dictionaries and text. Does not know what can be set (`config.py`), nor files and command lines, which are the
CLI's job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from packlight.core.config import Config
from packlight.core.errors import ConfigError

_EXPECTED: Mapping[str, str] = MappingProxyType(
    {
        "model_type": "a section of settings is expected; give it some, or leave it out",
        "list_type": "a list is expected, such as [a, b]",
    }
)
"""Where pydantic's words are about Python, by its kind of error."""


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The typed tree of `tree` (a parsed YAML file) with `a.b=c` overrides applied.

    Raises ConfigError naming the path, the value and the limit."""
    merged = tree
    for text in overrides:
        path, value = split_assignment(text, example="router.port=8080")
        merged = with_value(merged, path, _scalar(value))
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None


def split_assignment(text: str, *, example: str) -> tuple[list[str], str]:
    """`a.b=c` as (`[a, b]`, `c`). Raises ConfigError showing `example` for what is no assignment."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text}: expected path=value, for example --set {example}")
    return path.split("."), value


def with_value(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` that has `value` at `path`. What is no mapping on the way there gives way to one."""
    name, *below = path
    if not below:
        return {**tree, name: value}
    child = tree.get(name)
    return {**tree, name: with_value(child if isinstance(child, dict) else {}, below, value)}


def _scalar(text: str) -> Any:
    """`null`, booleans, lists `[a,b]`; numbers stay text, which pydantic converts to the field's type. `none` too, as
    in YAML: it is a recipe."""
    if text in ("null", "~"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("[") and text.endswith("]"):
        return [item.strip() for item in text[1:-1].split(",") if item.strip()]
    return text


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(path, _settings(Config), 1, cutoff=0.8)
        meant = f", did you mean {near[0]}?" if near else ""
        return f"{path}: no such setting{meant} (docs/configuration.md lists them all)"
    if detail["type"] in _EXPECTED:
        return f"{path}: {_EXPECTED[detail['type']]}, got {detail['input']!r}"
    if detail["type"] == "value_error":  # of a whole section: it names its settings itself
        return str(detail["ctx"]["error"])
    return f"{path}: {detail['msg'].lower()}, got {detail['input']!r}"


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The paths of every section and setting below `section`."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _settings(inner, f"{prefix}{name}.")
