"""Settings as YAML has them, and what somebody who wrote a wrong one is told: its path, and what may stand there.

Knows pydantic models. Does not know what a load test is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from packlight.core.config_tree import split_assignment, with_value
from packlight.core.errors import ConfigError


class Part(BaseModel):
    """A section of a settings file. What it does not name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Part)


def build(model: type[Model], tree: Mapping[str, Any], where: str) -> Model:
    """The typed tree. Raises ConfigError with one line per fault: `where`, the path, the value, what is allowed."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `a.b=value` applied, values as in YAML. Raises ConfigError for what is no assignment."""
    changed = dict(tree)
    for assignment in assignments:
        path, text = split_assignment(assignment, example="duration_s=60")
        changed = with_value(changed, path, _value(assignment, text))
    return changed


def parse_yaml(text: str | bytes, where: str) -> dict[str, Any]:
    """Raises ConfigError for what is not a mapping."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: a mapping of settings is expected, got {type(tree).__name__}")
    return tree


def _value(assignment: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: not a YAML value: {error}") from None


def _explain(model: type[BaseModel], detail: ErrorDetails) -> str:
    path, allowed = _walk(model, detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(str(detail["loc"][-1]), allowed, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"{path}: no such setting, allowed here: {', '.join(allowed)}{meant}"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    if detail["type"].startswith("union_tag"):
        return f"{path}.kind: got {_given(detail)}, must be one of {_tags(model, detail['loc'])}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]}" + (f", got {detail['input']!r}" if path else "")


def _given(detail: ErrorDetails) -> str:
    found = detail["input"]
    return repr(found.get("kind")) if isinstance(found, dict) else repr(found)


def _walk(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """The path as its author wrote it, without the tags of unions that pydantic puts in, and the names that its last
    section allows."""
    path: list[str] = []
    current: list[type[BaseModel]] = [model]
    for part in loc:
        tagged = [each for each in current if part in _tags_of(each)]
        if len(current) > 1 and tagged:
            current = tagged
            continue
        path.append(str(part))
        if part is not loc[-1]:
            fields = [each.model_fields[str(part)] for each in current if str(part) in each.model_fields]
            current = _sections(fields[0].annotation) if fields else current
    return ".".join(path), sorted({name for each in current for name in each.model_fields})


def _tags(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    field = model.model_fields[str(loc[0])]
    return ", ".join(tag for section in _sections(field.annotation) for tag in _tags_of(section))


def _tags_of(section: type[BaseModel]) -> tuple[str, ...]:
    kind = section.model_fields.get("kind")
    return tuple(map(str, get_args(kind.annotation))) if kind else ()


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, Annotated) or hasattr(annotation, "__args__"):
        return [section for inner in get_args(annotation) for section in _sections(inner)]
    return []
