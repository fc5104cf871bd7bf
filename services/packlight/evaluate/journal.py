"""What an evaluation has seen so far, on disk after every prompt: an interrupted run keeps what it has.

Knows observations and the results file. Does not know how either came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from packlight.evaluate.observations import Observation, to_points
from packlight.evaluate.results import Header, Results
from packlight.evaluate.textfile import write


class Journal:
    """The results of one run. `path` None keeps them in memory only."""

    def __init__(self, header: Header, path: Path | None, clock: Callable[[], float]) -> None:
        self._header, self._path, self._clock = header, path, clock
        self._started = clock()
        self._observations: list[Observation] = []

    def add(self, observations: Sequence[Observation]) -> None:
        """Raises ConfigError if the file cannot be written."""
        self._observations += observations
        if self._path is not None:
            write(self._path, self.results().to_json())

    def results(self) -> Results:
        durations = self._header.durations_s | {"measuring": self._clock() - self._started}
        return Results(header=replace(self._header, durations_s=durations), points=to_points(self._observations))
