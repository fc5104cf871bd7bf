"""`make gpu-check`: everything that needs a GPU, in one go, on a machine that has one.

    python -m tests.gpu.check                       kernels, tests, figures
    python -m tests.gpu.check --only tests,graphs   some parts
    python -m tests.gpu.check --minutes 9           ends after so long, whatever runs; 10 unless told otherwise
    python -m tests.gpu.check --commit 1a2b3c       what the files are of, where git cannot say

Nothing here runs in this process, so what hangs or crashes costs itself only. What each part found is written as soon
as it is over, to `<date>-<device>.json` in `--out` (docs/gpu) and in `.gpu`; a part that ended well for the same commit
is not run again. All that was said goes to a log beside it. The short table comes last. Nothing here touches the GPU's
settings. `docs/gpu.md` says what the parts are.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu import process
from tests.gpu.machine import ROOT, STATE, describe, environment, has_gpu, last_object, unpack_wheels
from tests.gpu.report import Report, table

LEAST_S = 20.0
FIGURE_COMMAND, FIGURE_LIMIT_S = ("-m", "tests.gpu.figures"), 120.0  # each figure may take so long
NUM_SAID = 6000
NO_PROGRAM = 127  # as shells say it

# Warnings are errors where the versions are those that we develop on.
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "--durations=10")
# A test that hangs shows where it does; but the first ones may wait for their kernels. Those without come first.
PYTEST_LIMITS = ("--timeout=360", "-o", "faulthandler_timeout=240")
WITHOUT_KERNELS = ("test_sampler", "test_staging", "test_triton")
TEST_FILES = (
    *sorted((ROOT / "tests/gpu").glob("test_*.py"), key=lambda file: (file.stem not in WITHOUT_KERNELS, file.stem)),
    ROOT / "tests/unit/transfer/test_gpu.py",
)


@dataclass(frozen=True, slots=True)
class Part:
    """A process of its own: `tool` runs Python with `command`; `is_beside` the next part, not before it."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    tool: tuple[str, ...] = ()
    is_beside: bool = False


PARTS = (
    # Compiled side by side, not one by one as tests ask for them: who needs one waits for it.
    Part("kernels", ("-m", "tests.gpu.kernels"), 420.0, is_beside=True),
    Part("tests", (*PYTEST, *PYTEST_LIMITS, *map(str, TEST_FILES)), 420.0),
)
MEMCHECK = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
# Run where they are asked for by name.
OTHER_PARTS = (Part("memcheck", (*PYTEST, "tests/gpu/test_triton.py"), 500.0, MEMCHECK),)
# Those that say most come first; the next ones use the model, and what was measured, of those before.
FIGURES = (
    "step_full",
    "step_packed",
    "graphs",
    "attention",
    "selection",
    "profile",
    "step_long",
    "concurrency",
    "link",
    "receiving",
)


class Session:
    """One run: how long it may take, where its parts run, and what is written."""

    def __init__(self, report: Report, log: Path, environ: Mapping[str, str], ends_at: float) -> None:
        self._report, self._log, self._environ, self._ends_at = report, log, environ, ends_at
        self._writing = threading.Lock()  # parts that run beside each other write to the same files

    def is_over(self, name: str) -> bool:
        over = self._ends_at - time.monotonic() < LEAST_S
        if over:
            self._say(f"── {name}: no time left\n")
        return over

    def run(self, part: Part) -> None:
        started, said = time.monotonic(), list[str]()
        command = (*part.tool, sys.executable, *part.command)
        rc = self._process(part.name, command, part.limit_s, lambda line: bool(said.append(line)))
        self._add(part.name, {"rc": rc, "seconds": _since(started), "said": "".join(said)[-NUM_SAID:]})

    def measure(self, names: Sequence[str]) -> list[str]:
        """Figures, in one process as long as it lives; those that are left when it ends: the first was its end."""
        left, said = list(names), list[str]()
        started = time.monotonic()

        def hear(line: str) -> bool:
            nonlocal started
            said.append(line)
            found = last_object(line)
            if not left or found.pop("figure", None) != left[0]:
                return False
            self._add(left.pop(0), {"rc": 0, "seconds": _since(started), "figures": found})
            started = time.monotonic()
            said.clear()
            return True

        rc = self._process(" ".join(left), (sys.executable, *FIGURE_COMMAND, *left), FIGURE_LIMIT_S, hear)
        if left:
            result = {"rc": rc or None, "seconds": _since(started), "said": "".join(said)[-NUM_SAID:], "figures": {}}
            self._add(left[0], result)
        return left

    def _process(self, name: str, command: Sequence[str], limit_s: float, hear: Callable[[str], bool]) -> int | None:
        self._say(f"── {name}\n")

        def heard(line: str) -> bool:
            self._say(line)
            return hear(line)

        try:
            return process.run(
                command, limit_s=limit_s, ends_at=self._ends_at, hear=heard, cwd=ROOT, environ=self._environ
            )
        except OSError as error:
            heard(f"{error}\n")
            return NO_PROGRAM

    def _say(self, text: str) -> None:
        with self._writing:
            print(text, end="", flush=True)
            with self._log.open("a") as log:
                log.write(text)

    def _add(self, name: str, result: Mapping[str, Any]) -> None:
        with self._writing:
            self._report.add(name, result)


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    started = time.monotonic()
    usual, others = [*(part.name for part in PARTS), *FIGURES], [part.name for part in OTHER_PARTS]
    named = (options.only or "").split(",")
    wanted = usual if options.only is None else [name for name in (*usual, *others) if name in named]
    if not has_gpu(environment(os.environ)):
        print("no GPU here: torch sees none, or there is no torch")
        return 2
    unpack_wheels()
    environ = environment(os.environ)
    found = describe(environ, options.commit)
    print(found, flush=True)
    stem = f"{time.strftime('%Y-%m-%d')}-{slug(found['device'])}"
    report = Report(f"{stem}.json", (options.out, STATE), found)
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(report, options.out / f"{stem}.log", environ, started + 60 * options.minutes)
    run_parts(session, report.lacks(wanted) if not options.again else wanted)
    print("\n".join(table(report.parts)))
    return 1 if report.lacks(wanted) else 0


def run_parts(session: Session, names: Sequence[str]) -> None:
    beside = []
    for part in (*PARTS, *OTHER_PARTS):
        if part.name not in names or session.is_over(part.name):
            continue
        if part.is_beside:
            beside.append(threading.Thread(target=session.run, args=(part,), daemon=True))
            beside[-1].start()
        else:
            session.run(part)
    for thread in beside:
        thread.join()
    left = [name for name in FIGURES if name in names]
    while left and not session.is_over(left[0]):
        left = session.measure(left)[1:]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check")
    every = ", ".join((*(part.name for part in (*PARTS, *OTHER_PARTS)), *FIGURES))
    parser.add_argument("--only", metavar="PART,...", help=f"some of {every}")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all of it may take")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", metavar="FOLDER")
    parser.add_argument("--again", action="store_true", help="also what ended well for this commit before")
    parser.add_argument("--commit", help="what the files are of; git is asked otherwise")
    return parser.parse_args(argv)


def slug(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


if __name__ == "__main__":
    sys.exit(main())
