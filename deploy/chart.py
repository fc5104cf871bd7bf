"""Writes what is generated of the Helm chart: values.schema.json, the table in its README, the dashboards, the golden
renders.

`python -m deploy.chart` writes them, `python -m deploy.chart --check` says which differ from what is there. The schema
comes from three places, each of which says what it alone knows: the types of the defaults and the `# --` comments in
values.yaml, the exceptions in values.schema.yaml, and the settings in `packlight.core.config`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from deploy import tools
from deploy.observability.generate import dashboards
from packlight.core.config import Config

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "packlight"
GOLDEN = ROOT / "tests" / "deploy" / "golden"
CASES: Mapping[str, tuple[Path, ...]] = {
    "default": (),
    "cpu": (CHART / "values-cpu.yaml",),
    "h100": (CHART / "values-h100.yaml",),
    "everything": (GOLDEN / "values-everything.yaml",),
}
GOLDEN_HELM = "4.1"
POOLS = ("prefill", "decode")  # the values that overlay `workers`
_COMMENT = re.compile(r"\s*# ?(--)? ?(.*)")


@dataclass(frozen=True, slots=True)
class Value:
    """One documented value, or one mapping of values: dotted path, default, and what the comment above says."""

    path: str
    default: Any
    meaning: str
    is_flow: bool


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.chart", description="Generates parts of the Helm chart.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something differs")
    options = parser.parse_args()
    changed = []
    for path, text in generated():  # lazily: each may depend on those before being written
        if path.is_file() and path.read_text() == text:
            continue
        changed.append(path)
        if not options.check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'out of date, run python -m deploy.chart' if options.check else 'written'}")
    return 1 if options.check and changed else 0


def generated() -> Iterator[tuple[Path, str]]:
    """Every generated file and its text. The renders come last: helm checks them against the schema, and the dashboards
    are in them."""
    yield CHART / "values.schema.json", json.dumps(values_schema(), indent=2) + "\n"
    yield CHART / "README.md", readme((CHART / "README.md").read_text())
    yield from dashboards()
    for name, files in CASES.items():
        yield GOLDEN / f"{name}.yaml", render(GOLDEN_HELM, *files)


def render(helm: str, *files: Path, sets: tuple[str, ...] = (), chart: Path = CHART) -> str:
    """`helm template` of a release called `demo`. Raises CalledProcessError with helm's words in `stderr`."""
    flags = [flag for file in files for flag in ("--values", str(file))] + [f"--set-json={item}" for item in sets]
    command = [str(tools.helm(helm)), "template", "demo", str(chart), "--namespace", "serving", *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ── values.schema.json ───────────────────────────────────────────────────────────────────────────────────────────────


def values_schema() -> dict[str, Any]:
    """Draft 7, the newest that Helm 3 reads."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    meanings = {value.path: value.meaning for value in documented_values()}
    exceptions = yaml.safe_load((CHART / "values.schema.yaml").read_text())
    builder = SchemaBuilder(exceptions, meanings)
    definitions, config = config_schema()
    definitions["workers"] = builder.of(defaults["workers"], "workers")
    special = {name: {"$ref": "#/definitions/workers"} for name in ("workers", *POOLS)} | {"config": config}
    root = builder.mapping({key: value for key, value in defaults.items() if key not in special}, "")
    builder.finish()
    # Helm itself puts `global` there, for charts that have this one as a part.
    properties = {key: special.get(key) or root["properties"][key] for key in defaults} | {"global": {"type": "object"}}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the Packlight chart"}
    return head | root | {"properties": properties, "definitions": definitions}


class SchemaBuilder:
    """Schemas of default values: by an exception whose pattern fits the path, else by the default's own type."""

    def __init__(self, exceptions: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
        self._exceptions, self._meanings = exceptions, meanings
        self._unused = set(exceptions)

    def of(self, default: Any, path: str) -> dict[str, Any]:
        schema = self._exception(path) or self._inferred(default, path)
        meaning = self._meanings.get(path)
        return {"description": meaning, **schema} if meaning else schema

    def mapping(self, defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
        prefix = f"{path}." if path else ""
        properties = {key: self.of(value, f"{prefix}{key}") for key, value in defaults.items()}
        return {"type": "object", "additionalProperties": False, "properties": properties}

    def finish(self) -> None:
        """Raises ValueError for exceptions that no value needs."""
        if self._unused:
            raise ValueError(f"values.schema.yaml: no value fits {', '.join(sorted(self._unused))}")

    def _exception(self, path: str) -> dict[str, Any] | None:
        for pattern, schema in self._exceptions.items():
            if fnmatchcase(path, pattern):
                self._unused.discard(pattern)
                return dict(schema)
        return None

    def _inferred(self, default: Any, path: str) -> dict[str, Any]:
        if isinstance(default, dict) and default:
            return self.mapping(default, path)
        if isinstance(default, bool):
            return {"type": "boolean"}
        if isinstance(default, int):
            return {"type": "integer", "minimum": 0}
        if isinstance(default, str):
            return {"type": "string"}
        raise ValueError(f"values.yaml: {path}: {default!r} does not say its type: add it to values.schema.yaml")


def config_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """(definitions, schema) of `config`: the settings of `packlight.core.config`."""
    schema = _plain(Config.model_json_schema(ref_template="#/definitions/{model}"))
    return schema.pop("$defs"), schema


def _plain(node: Any) -> Any:
    """Without titles, which repeat names, and defaults, which the processes know; but settings may be called so."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("title", "default") or isinstance(value, dict)}
    return {key: _plain(value) for key, value in kept.items()}


# ── README.md ────────────────────────────────────────────────────────────────────────────────────────────────────────


def readme(text: str) -> str:
    """`text` with its table of values made anew."""
    values = documented_values()
    in_one_line = tuple(f"{value.path}." for value in values if value.is_flow)
    rows = [
        f"| `{value.path}` | {_code(value)} | {value.meaning} |" for value in values if _has_row(value, in_one_line)
    ]
    table = "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])
    return re.sub(
        r"(<!-- values -->\n).*?(<!-- /values -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL
    )


def documented_values() -> list[Value]:
    """Every value of values.yaml in order, mappings before what is in them."""
    text = (CHART / "values.yaml").read_text()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return list(_walk(root, yaml.safe_load(text), "", text.splitlines()))


def _walk(node: yaml.MappingNode, defaults: Mapping[str, Any], prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path, default = f"{prefix}{key.value}", defaults[key.value]
        is_first_on_line = not lines[key.start_mark.line][: key.start_mark.column].strip()
        meaning = _comment_above(lines, key.start_mark.line) if is_first_on_line else ""
        yield Value(path, default, meaning, bool(value.flow_style) if isinstance(default, dict | list) else False)
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, default, f"{path}.", lines)


def _comment_above(lines: list[str], line: int) -> str:
    """The text of the comment that starts with `# --` and ends right above `line`, or nothing."""
    words: list[str] = []
    while line > 0 and (match := _COMMENT.fullmatch(lines[line - 1])):
        line -= 1
        words.insert(0, match[2])
        if match[1]:
            return " ".join(words)
    return ""


def _has_row(value: Value, in_one_line: tuple[str, ...]) -> bool:
    """Mappings only where they are said in one line; not what is in such a line, nor the settings in `config`."""
    if value.path.startswith(("config.", *in_one_line)):
        return False
    return value.path == "config" or value.is_flow or not isinstance(value.default, dict)


def _code(value: Value) -> str:
    if value.path == "config":
        return "see values.yaml"
    return f"`{json.dumps(value.default)}`"


if __name__ == "__main__":
    sys.exit(main())
