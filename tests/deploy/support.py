"""What the tests of images and chart share: fetched tools, rendered objects, and a Dockerfile as data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import chart, tools
from packlight.telemetry.catalogue import CATALOGUE, Kind, Metric, full_name

Object = dict[str, Any]
HELM_VERSIONS = tuple(tools.HELM)
CASES = tuple(chart.CASES)
DOCKERFILE = chart.ROOT / "deploy" / "Dockerfile"


def fetched(fetch: Callable[[], Path]) -> Path:
    """A tool, or the test is skipped saying why there is none."""
    try:
        return fetch()
    except tools.ToolMissing as reason:
        pytest.skip(f"needs a tool that cannot be fetched: {reason}")


@cache
def rendered(case: str, helm: str = chart.GOLDEN_HELM, sets: tuple[str, ...] = ()) -> str:
    fetched(lambda: tools.helm(helm))
    return chart.render(helm, *chart.CASES[case], sets=sets)


def refused(*sets: str, helm: str = chart.GOLDEN_HELM, case: str = "default") -> str:
    """What helm says against these values (`path=json`). Fails if it takes them."""
    fetched(lambda: tools.helm(helm))
    with pytest.raises(subprocess.CalledProcessError) as failure:
        chart.render(helm, *chart.CASES[case], sets=sets)
    return str(failure.value.stderr)


def objects(case: str, *sets: str) -> list[Object]:
    return [item for item in yaml.load_all(rendered(case, sets=sets), yaml.CSafeLoader) if item]


def pick(items: list[Object], kind: str, component: str | None = None) -> Object:
    """The only object of the kind, and component if given."""
    label = "app.kubernetes.io/component"
    (found,) = (
        item for item in items if item["kind"] == kind and component in (None, item["metadata"]["labels"].get(label))
    )
    return found


def pod_spec(items: list[Object], component: str) -> Object:
    spec: Object = pick(items, "Deployment", component)["spec"]["template"]["spec"]
    return spec


def container(items: list[Object], component: str) -> Object:
    (only,) = pod_spec(items, component)["containers"]
    return dict(only)


def pod_specs(items: list[Object]) -> Iterator[Object]:
    for item in items:
        if item["kind"] == "Pod":
            yield item["spec"]
        elif item["kind"] in ("Deployment", "Job"):
            yield item["spec"]["template"]["spec"]


def config_tree(items: list[Object]) -> Object:
    """What the processes read."""
    tree: Object = yaml.safe_load(pick(items, "ConfigMap", "config")["data"]["packlight.yaml"])
    return tree


def with_kubernetes_validate(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the folder that has `kubernetes_validate` and `jsonschema`."""
    folder = fetched(tools.kubernetes_validate)
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    environ = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


# ── a Dockerfile as data ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Stage:
    """One `FROM`: its name, what it stands on (a stage or an image), and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, keyword: str) -> str | None:
        return next((text for word, text in reversed(self.instructions) if word == keyword), None)


def stages(text: str | None = None) -> dict[str, Stage]:
    """The stages of deploy/Dockerfile, build arguments before the first `FROM` filled in."""
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for word, rest in _instructions(text or DOCKERFILE.read_text()):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(name, expand(base, arguments))
        elif found:
            list(found.values())[-1].instructions.append((word, rest))
        else:
            name, _, value = rest.partition("=")
            arguments[name] = value
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those it stands on, the lowest first."""
    known = stages()
    chain: list[Stage] = []
    while name in known:
        chain.insert(0, known[name])
        name = known[name].base
    return chain


def inherited(name: str, keyword: str) -> str:
    """The instruction that holds for an image of this target. Raises StopIteration if there is none."""
    return next(found for stage in reversed(lineage(name)) if (found := stage.last(keyword)) is not None)


def expand(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: variables.get(match[1], match[0]), text)


def flags(text: str) -> tuple[dict[str, str], list[str]]:
    """(`--name=value` flags, the other words) of an instruction."""
    words = shlex.split(text)
    named = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    return named, [word for word in words if not word.startswith("--")]


def command_of(text: str) -> list[str]:
    """The JSON form of ENTRYPOINT, CMD or `HEALTHCHECK ... CMD`."""
    command: list[str] = json.loads(text[text.index("[") :])
    return command


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word, rest.strip()


# ── metrics in expressions ───────────────────────────────────────────────────────────────────────────────────────────

_SUFFIXES = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
_METRICS = {
    full_name(role, metric) + suffix: metric
    for role, metrics in CATALOGUE.items()
    for metric in metrics
    for suffix in _SUFFIXES[metric.kind]
}


def metrics_named_in(expr: str) -> dict[Metric, set[float]]:
    """The metrics of an expression, with the bucket bounds it asks for. KeyError for one that the catalogue lacks, or
    has as another kind."""
    names = re.findall(r'\b(packlight_\w+)(?:\{[^}]*?le="([\d.]+)")?', expr)
    found: dict[Metric, set[float]] = {}
    for name, bound in names:
        found.setdefault(_METRICS[name], set()).update({float(bound)} if bound else ())
    return found
