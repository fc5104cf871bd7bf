"""What `make gpu-check` found: the file, which a later run goes on from, and the short table against the goals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure and what it should reach. `at_most` turns the comparison round."""

    part: str
    figure: str
    goal: float
    what: str
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


GOALS = (
    Goal("step_full", "share_of_copy", 0.8, "decode step, full KV, batch 16, 32k: share of copy bandwidth"),
    Goal("step_packed", "speedup", 3.0, "decode step, rocketkv 512 tokens, batch 16, 32k: times faster than full KV"),
    Goal("step_long", "speedup", 3.3, "the same, batch 1, 128k"),
    Goal("attention", "speedup", 8.0, "attention alone, 1/16 of the pages, 32k: times faster than dense"),
    Goal("attention", "choosing_share", 0.25, "choosing pages: share of the sparse attention's time", at_most=True),
    Goal("selection", "share_of_prefill", 0.01, "selection and packing at 32k: share of prefill", at_most=True),
    Goal("graphs", "speedup", 2.0, "graph replay, batch 1: times faster than eager"),
    Goal("concurrency", "times", 8.0, "requests of 32k in 60 GB, 8x packing: times those with full KV"),
    Goal("link", "share_of_link", 0.5, "pack and copy to pinned memory: share of the link"),
    Goal("receiving", "share_of_link", 0.5, "packed KV into pages beside steps: share of the link"),
    Goal("receiving", "slowdown", 0.1, "by how much longer a packed step takes meanwhile", at_most=True),
)


class Report:
    """One file, kept in several folders. What an earlier run of the same commit found is taken over from the first of
    them that has it; a run that does not know its commit takes nothing over."""

    def __init__(self, name: str, folders: Sequence[Path], found: Mapping[str, Any]) -> None:
        self._paths, self._found = [folder / name for folder in folders], dict(found)
        self.parts: dict[str, Any] = {}
        for path in filter(Path.is_file, self._paths):
            before = json.loads(path.read_text())
            if found.get("commit") and before.get("commit") == found["commit"]:
                self.parts = before["parts"]
                return

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        self.parts[name] = dict(result)
        text = json.dumps({**self._found, "parts": self.parts}, indent=2) + "\n"
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that were not run, or did not end well."""
        return [name for name in names if self.parts.get(name, {}).get("rc") != 0]


def table(parts: Mapping[str, Any]) -> list[str]:
    """One line per part that is no figure, one per goal."""
    lines = [
        f"{name:12} {'passed' if result['rc'] == 0 else 'FAILED'} in {result['seconds']} s"
        for name, result in parts.items()
        if "figures" not in result
    ]
    for goal in GOALS:
        value = parts.get(goal.part, {}).get("figures", {}).get(goal.figure)
        if value is None:
            lines.append(f"{goal.what}: not measured")
            continue
        sign = "<=" if goal.at_most else ">="
        lines.append(f"{goal.what}: {value:.3g} (goal {sign} {goal.goal:g}{'' if goal.is_met(value) else ', MISSED'})")
    return lines
