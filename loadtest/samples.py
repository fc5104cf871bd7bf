"""What the sending process hands back: one line for each request, and when its clock began.

Knows the file between the two processes, JSON lines, appended as answers come: whatever ends a run, they are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from packlight.bench.serve.answers import STRICT, Answer, Count, Seconds


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Sample:
    """One request. `conversation` counts through the plan. `slot_wait_s`: how long it was due before there was a slot
    for it, of `max_in_flight`; its answer's times count from when it was due all the same."""

    conversation: Count
    turn: Count
    slot_wait_s: Seconds
    answer: Answer

    def to_message(self) -> dict[str, Any]:
        found: dict[str, Any] = TypeAdapter(Sample).dump_python(self, mode="json")
        return found


class SampleFile:
    """Written by the one process that collects: Locust's only one, or its master."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, at_s: float) -> None:
        """Anew: a test may be started again from Locust's web page. `at_s` is Unix time."""
        self._path.write_text(_line({"began_at": at_s}), encoding="utf-8")

    def add(self, message: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(message))


def read_samples(path: Path) -> tuple[float | None, tuple[Sample, ...]]:
    """When the clock began (Unix time; None if it never did) and the requests so far, in the order of the plan. A last
    line that was cut is left out."""
    parser, began_at, samples = TypeAdapter(Sample), None, []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        found = json.loads(line)
        if "began_at" in found:
            began_at = float(found["began_at"])
        else:
            samples.append(parser.validate_python(found))
    return began_at, tuple(sorted(samples, key=lambda sample: (sample.conversation, sample.turn)))


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"
