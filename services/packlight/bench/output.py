"""What a benchmark leaves behind: JSON for programs, a table for people, and the machine that both depend on.

Knows files and the terminal. One rule for all benchmarks: `--json` alone prints the JSON and nothing else on stdout;
`--json FILE` writes the file, and the table is printed. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packlight.core.errors import ConfigError
from packlight.evaluate.textfile import write
from packlight.native.variants import cpu_flags

STDOUT = "-"
_VECTOR_FLAGS = ("sse4_2", "f16c", "fma", "avx", "amx")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=STDOUT,
        help="write the results here; without a FILE print them, and nothing else, on stdout",
    )


def check_output(target: str | None) -> None:
    """Before minutes are spent on measuring. Raises ConfigError if the file's folder is not there."""
    if target not in (None, STDOUT) and not Path(str(target)).resolve().parent.is_dir():
        raise ConfigError(f"--json {target}: there is no such folder; make it first")


def emit(report: Mapping[str, Any], lines: Sequence[str], target: str | None) -> None:
    """The report as JSON where `target` says, the lines for people otherwise."""
    text = json.dumps(report, indent=2) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    if target is not None:
        write(Path(target), text)
    print("\n".join(lines), flush=True)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    shown = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        shown.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    return [shown[0], "  ".join("-" * width for width in widths), *shown[1:]]


def numbers(flag: str, text: str) -> list[float]:
    """`1,2.5,1e6`. Raises ConfigError naming the flag."""
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{flag}: got {text!r}, must be numbers separated by commas") from None


def counts(flag: str, text: str) -> list[int]:
    """`1,8,1e6`: whole numbers of at least 1. Raises ConfigError naming the flag."""
    values = numbers(flag, text)
    if any(value < 1 or value != int(value) for value in values):
        raise ConfigError(f"--{flag}: got {text!r}, must be whole numbers of at least 1, separated by commas")
    return [int(value) for value in values]


def machine_facts(num_threads: int | None = None) -> dict[str, Any]:
    """What times depend on. `cores` are those this process may run on, `threads` those that compute."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": num_threads,
        "isa": sorted(flag for flag in cpu_flags() if flag.startswith(_VECTOR_FLAGS)),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": _version("torch"),
        "packlight": _version("packlight"),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores{threads}, load {machine['load_1min']:.1f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Linux keeps the name in /proc; elsewhere the architecture has to do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
