"""Measuring fairly on a machine that others use too: subjects take turns, and only neighbours in time are compared.

Knows functions and a clock. Does not know what is measured. A figure is the median over rounds with the smallest and
largest beside it; a ratio is taken within each round, where both sides had the same neighbours, and then the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """One quantity, once per round. At least one value."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def over(self, other: Spread) -> Spread:
        """The ratio to `other`, round by round."""
        return Spread(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    def per(self, amount: float) -> Spread:
        """`amount` divided by each value: a rate, if the values are seconds."""
        return Spread(tuple(amount / value for value in self.values))

    def times(self, factor: float) -> Spread:
        return Spread(tuple(value * factor for value in self.values))

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": min(self.values), "max": max(self.values)}


def take_turns(
    subjects: Mapping[str, Callable[[], float]],
    num_rounds: int,
    *,
    budget_s: float | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Spread]:
    """What each subject returned, round by round. The order rotates, so that nobody always follows the same one. With
    a budget no round is begun, after the first, that would not end within it if it took as long as the mean one."""
    names, started = list(subjects), clock()
    values: dict[str, list[float]] = {name: [] for name in names}
    for index in range(num_rounds):
        if index and budget_s is not None and (clock() - started) * (index + 1) / index > budget_s:
            break
        start = index % max(1, len(names))
        for name in names[start:] + names[:start]:
            values[name].append(subjects[name]())
    return {name: Spread(tuple(each)) for name, each in values.items()}


def seconds_of(function: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """How long one call takes."""
    started = clock()
    function()
    return clock() - started


def slices_of(function: Callable[[], object], slice_s: float, clock: Clock = time.perf_counter) -> Callable[[], float]:
    """A subject for `take_turns`: calls `function` about `slice_s` long, at least once, and returns the mean seconds of
    a call. It is called twice here: to warm up, and to see how many calls fill a slice."""
    function()
    num_calls = max(1, int(slice_s / max(seconds_of(function, clock), 1e-9)))

    def take_slice() -> float:
        started = clock()
        for _ in range(num_calls):
            function()
        return (clock() - started) / num_calls

    return take_slice


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed (nearest rank)."""
    rank = ceil(round(share * len(values), 6))  # 0.07 of 100 are 7.000000000000001
    return sorted(values)[max(rank, 1) - 1]
