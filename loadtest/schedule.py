"""When requests are due: instants fixed before a run starts, so that no answer can move them.

Knows rates and arithmetic. A rate that changes over time is a chain of stretches, each with a rate at its start and its
end. Arrivals are drawn where time passes at one request per second, and taken back to real time through the inverse of
the expected number of requests: the usual way to a Poisson process whose rate varies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, takewhile
from math import sqrt
from random import Random

from loadtest.scenario import Burst, Process, Ramp, Steady


@dataclass(frozen=True, slots=True)
class Stretch:
    """`duration_s` during which the rate goes evenly from one value to another, in requests per second."""

    duration_s: float
    from_per_s: float
    to_per_s: float

    @property
    def num_expected(self) -> float:
        return self.duration_s * (self.from_per_s + self.to_per_s) / 2

    def when(self, num: float) -> float:
        """Seconds from the start until `num` requests are expected, 0 <= num <= num_expected.

        The stable root of `from * t + slope / 2 * t**2 = num`."""
        slope = (self.to_per_s - self.from_per_s) / self.duration_s
        root = sqrt(max(self.from_per_s**2 + 2 * slope * num, 0.0))
        return 2 * num / (self.from_per_s + root) if num else 0.0


def stretches(arrivals: Steady | Ramp | Burst, duration_s: float) -> list[Stretch]:
    """The rate over a whole run."""
    if isinstance(arrivals, Steady):
        return [Stretch(duration_s, arrivals.rate_per_s, arrivals.rate_per_s)]
    if isinstance(arrivals, Ramp):
        return [Stretch(duration_s, arrivals.from_per_s, arrivals.to_per_s)]
    return list(_bursts(arrivals, duration_s))


def _bursts(arrivals: Burst, duration_s: float) -> Iterator[Stretch]:
    """A pause, then a burst, again and again; the end of the run cuts what it meets."""
    left_s = duration_s
    while left_s > 0:
        for lasts_s, rate in (
            (arrivals.every_s - arrivals.burst_s, arrivals.rate_per_s),
            (arrivals.burst_s, arrivals.burst_per_s),
        ):
            if left_s > 0:
                yield Stretch(min(lasts_s, left_s), rate, rate)
                left_s -= lasts_s


def due_times(parts: Sequence[Stretch], process: Process, seed: str) -> list[float]:
    """Seconds from the start of the run, ascending, all before its end."""
    rng = Random(f"arrivals/{seed}")
    marks = accumulate(iter(lambda: rng.expovariate(1.0), None)) if process == "poisson" else map(float, count())
    total = sum(part.num_expected for part in parts)
    return list(_real_times(parts, takewhile(lambda mark: mark < total, marks)))


def _real_times(parts: Sequence[Stretch], marks: Iterator[float]) -> Iterator[float]:
    """Each mark is a number of requests that are expected by then."""
    remaining = iter(parts)
    part, began_s, num_before = next(remaining), 0.0, 0.0
    for mark in marks:
        while mark - num_before >= part.num_expected:
            began_s, num_before = began_s + part.duration_s, num_before + part.num_expected
            part = next(remaining)
        yield began_s + part.when(mark - num_before)
