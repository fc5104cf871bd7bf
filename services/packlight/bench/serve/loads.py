"""When requests are sent: a load, as plain numbers and instants.

Closed loop: `concurrency` users, each sends when the last answer is complete; says how fast a server is under a fixed
number of requests. Open loop: arrivals at `rate` a second as a Poisson process, whatever has been answered by then;
says what users of a busy server wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random


@dataclass(frozen=True, slots=True)
class Load:
    """One of the two is set. `rate` is requests per second."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate is None)

    @property
    def label(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency is not None else f"{self.rate:g} per s"


def arrivals(rate: float, num_requests: int, seed: str) -> list[float]:
    """Seconds from the start of the turn, ascending, the first at 0: gaps are exponential with mean `1 / rate`."""
    rng = Random(f"arrivals/{seed}")
    return list(accumulate((rng.expovariate(rate) for _ in range(num_requests - 1)), initial=0.0))
