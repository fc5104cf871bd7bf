"""Speeds that workers measure of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

LEAST_SPREAD = 0.05
"""Sizes that differ by less than this share of their mean say nothing of the part that does not depend on size."""

LEAST_SHIPPED_BYTES = 64 << 10
"""Smaller shipments tell how long a call takes, not how fast a link is."""

LONGEST_STEP = 4.0
"""Times what was expected. One that takes longer was paused, or the machine is slower now: more such steps tell."""

ENOUGH_STEPS = 8.0
"""To expect anything."""


@dataclass(slots=True)
class Rate:
    """Units per second over a fading past: what was added `half_life_s` measured seconds ago counts half.

    Sums fade, not ratios, so a step of one token does not weigh as much as a step of a thousand."""

    half_life_s: float = 10.0
    amount: float = 0.0
    elapsed_s: float = 0.0

    def add(self, amount: float, elapsed_s: float) -> None:
        fade = 0.5 ** (elapsed_s / self.half_life_s)
        self.amount = self.amount * fade + amount
        self.elapsed_s = self.elapsed_s * fade + elapsed_s

    @property
    def per_s(self) -> float:
        """0 while nothing was measured."""
        return self.amount / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """A step of n tokens takes `fixed_s + n * token_s`: reading the weights, and computing."""

    fixed_s: float
    token_s: float


class StepTimer:
    """The pace of recent steps: the least-squares line through their sizes and durations, which fade like a `Rate`'s.

    Where the steps do not tell the two parts apart - all have one size, or noise makes a part negative - all of it is
    put down to the tokens."""

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._num = self._tokens = self._seconds = self._tokens_squared = self._tokens_seconds = 0.0

    def add(self, num_tokens: int, elapsed_s: float) -> None:
        fade = 0.5 ** (elapsed_s / self._half_life_s)
        elapsed_s = min(elapsed_s, self._longest_s(num_tokens))
        self._num = self._num * fade + 1.0
        self._tokens = self._tokens * fade + num_tokens
        self._seconds = self._seconds * fade + elapsed_s
        self._tokens_squared = self._tokens_squared * fade + num_tokens**2
        self._tokens_seconds = self._tokens_seconds * fade + num_tokens * elapsed_s

    def _longest_s(self, num_tokens: int) -> float:
        """A short step may take as long as others do: where all were long, nobody knows what of it is fixed."""
        pace = self.pace
        if pace is None or self._num < ENOUGH_STEPS:
            return inf
        return LONGEST_STEP * max(pace.fixed_s + num_tokens * pace.token_s, self._seconds / self._num)

    @property
    def pace(self) -> Pace | None:
        """None while nothing was measured."""
        if self._tokens == 0 or self._seconds == 0:
            return None
        mean_tokens, mean_s = self._tokens / self._num, self._seconds / self._num
        variance = self._tokens_squared / self._num - mean_tokens**2
        if variance <= (LEAST_SPREAD * mean_tokens) ** 2:
            return Pace(0.0, mean_s / mean_tokens)
        token_s = (self._tokens_seconds / self._num - mean_tokens * mean_s) / variance
        fixed_s = mean_s - token_s * mean_tokens
        return Pace(fixed_s, token_s) if token_s > 0 and fixed_s > 0 else Pace(0.0, mean_s / mean_tokens)
