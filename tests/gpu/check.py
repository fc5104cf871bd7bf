"""`make gpu-check`: everything that needs a GPU, in one go, on a machine that has one.

    python -m tests.gpu.check                       kernels, tests, figures; about ten minutes
    python -m tests.gpu.check --only tests          one part
    python -m tests.gpu.check --minutes 9           nothing is begun that would end later

Parts run in processes of their own, so that one that hangs or crashes costs itself only. What each has found is written
as soon as it is over, to `docs/gpu/<date>-<device>.json`; a part that is there for the same commit is not run again.
The short table comes last. Nothing here touches the GPU's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu" / "wheels"
VENV = ROOT / ".gpu" / "venv"
LEAST_S = 30.0


@dataclass(frozen=True, slots=True)
class Part:
    """One process. `limit_s` is what it may take; `figures` says that its last line of output is JSON."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    figures: bool = False


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


PYTEST = (
    "-m",
    "pytest",
    "-q",
    "-m",
    "gpu",
    "tests/gpu",
    "tests/unit/transfer/test_gpu.py",
    "-p",
    "no:cacheprovider",
    "--timeout=240",
)
PARTS = (
    Part("kernels", ("-m", "tests.gpu.kernels"), 240.0),  # compiled side by side, not one by one as tests ask for them
    Part("tests", PYTEST, 270.0),
    *(
        Part(name, ("-m", "tests.gpu.figures", name), limit_s, figures=True)
        for name, limit_s in (
            ("step_full", 100.0),
            ("step_packed", 90.0),
            ("step_long", 90.0),
            ("attention", 60.0),
            ("selection", 60.0),
            ("graphs", 60.0),
            ("concurrency", 30.0),
            ("link", 30.0),
        )
    ),
)
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
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check")
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing that could end later")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", metavar="FOLDER")
    parser.add_argument("--again", action="store_true", help="also what was run for this commit before")
    options = parser.parse_args(argv)
    parts = [part for part in PARTS if options.only is None or part.name in options.only.split(",")]
    ends_at = time.monotonic() + 60 * options.minutes
    seen = describe(sys.executable)
    if "device" not in seen:
        print(f"no GPU here: {seen['problem']}")
        return 2
    python = _python()
    found = describe(python)
    report = Report(options.out / f"{time.strftime('%Y-%m-%d')}-{slug(found['device'])}.json", found)
    for part in todo(parts, report.parts, again=options.again):
        left_s = ends_at - time.monotonic()
        if left_s < LEAST_S:
            print(f"{part.name}: no time left")
            continue
        report.add(part.name, run(part, python, min(part.limit_s, left_s)))
    print("\n".join(table(report.parts)))
    return 0 if all(report.parts.get(part.name, {}).get("rc") == 0 for part in parts) else 1


class Report:
    """The file. What an earlier run of the same commit found is taken over."""

    def __init__(self, path: Path, found: Mapping[str, Any]) -> None:
        self._path, self._found = path, dict(found)
        self.parts: dict[str, Any] = {}
        if path.is_file():
            before = json.loads(path.read_text())
            if before.get("commit") == found.get("commit"):
                self.parts = before["parts"]

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        self.parts[name] = dict(result)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({**self._found, "parts": self.parts}, indent=2) + "\n")


def todo(parts: Sequence[Part], done: Mapping[str, Any], *, again: bool) -> list[Part]:
    """What is left: parts that were not run, or did not end well."""
    return [part for part in parts if again or done.get(part.name, {}).get("rc") != 0]


def run(part: Part, python: str, limit_s: float) -> dict[str, Any]:
    """What became of it: rc (None: it ran past its limit), seconds, figures, and the end of what it said."""
    print(f"── {part.name}", flush=True)
    started = time.monotonic()
    environ = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT / 'services'}:{ROOT}"}
    try:
        done = subprocess.run(
            [python, *part.command], cwd=ROOT, env=environ, timeout=limit_s, capture_output=True, text=True, check=False
        )
        rc, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        rc, said = None, _text(late.stdout) + _text(late.stderr)
    print(said[-2000:], flush=True)
    result = {"rc": rc, "seconds": round(time.monotonic() - started, 1), "said": said[-1500:]}
    return result | ({"figures": figures_in(said)} if part.figures else {})


def figures_in(said: str) -> dict[str, Any]:
    """The last line that is a JSON object; empty if there is none."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


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


def slug(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


_DESCRIBE = """
import json, platform
found = {"python": platform.python_version()}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {"device": torch.cuda.get_device_name(0), "memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    found["driver"] = torch.cuda.driver_version() if hasattr(torch.cuda, "driver_version") else None
    import flashinfer, transformers
    found |= {"flashinfer": flashinfer.__version__, "transformers": transformers.__version__}
except Exception as error:
    found["problem"] = repr(error)
print(json.dumps(found))
"""


def describe(python: str) -> dict[str, Any]:
    """Device, versions and commit; `problem` says what could not be found out, and without a GPU there is no device."""
    done = subprocess.run([python, "-c", _DESCRIBE], capture_output=True, text=True, check=False, cwd=ROOT)
    found = figures_in(done.stdout) or {"problem": done.stderr[-500:]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return found | {"commit": commit.stdout.strip() or None, "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _python() -> str:
    """This interpreter, or one that has the carried wheels beside everything this one has."""
    if not WHEELS.is_dir():
        return sys.executable
    python = str(VENV / "bin" / "python")
    if not VENV.is_dir():
        subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(VENV)], check=True)
        wheels = sorted(map(str, WHEELS.glob("*.whl")))
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels]
        subprocess.run(install, check=True)
    return python


def _text(output: bytes | str | None) -> str:
    """subprocess gives bytes here, whatever `text` says."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    sys.exit(main())
