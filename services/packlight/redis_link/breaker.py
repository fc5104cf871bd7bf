"""A circuit breaker: whether a backend that failed may be asked again.

Knows two facts (when it may next be tried, whether somebody is trying) and a clock. Knows no backend and never waits.

    closed ──fail──▶ open ──cooldown_s──▶ half-open: one caller is let through ──succeed──▶ closed
                                                                               └───fail───▶ open

A late answer counts as a failure only when it is the second in a row: one alone is more often a busy machine.
The pattern is M. Nygard's ("Release It!", 2nd edition, 2018, chapter 5).
"""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """Every `allow()` that returns True is followed by exactly one of `succeed`, `fail`, `strike` or `abandon`."""

    def __init__(self, cooldown_s: float, clock: Callable[[], float]) -> None:
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._retry_at: float | None = None  # None: closed
        self._is_probing = False
        self._is_struck = False
        self._num_heals = 0

    @property
    def is_open(self) -> bool:
        """Half-open counts as open: nothing is known to work yet."""
        return self._retry_at is not None

    @property
    def num_heals(self) -> int:
        """How often it closed again after having been open."""
        return self._num_heals

    def allow(self) -> bool:
        """Whether the caller may ask the backend now."""
        if self._retry_at is None:
            return True
        if self._is_probing or self._clock() < self._retry_at:
            return False
        self._is_probing = True
        return True

    def succeed(self) -> None:
        """The backend answered."""
        self._num_heals += self.is_open
        self._retry_at = None
        self._is_probing = self._is_struck = False

    def fail(self) -> None:
        """The backend did not answer, or cannot do what it is asked."""
        self._retry_at = self._clock() + self._cooldown_s
        self._is_probing = False

    def strike(self) -> None:
        """The backend did not answer in time."""
        if self._is_struck or self.is_open:
            self.fail()
        self._is_struck = True

    def abandon(self) -> None:
        """The call ended without saying anything about the backend (its caller gave up, say)."""
        self._is_probing = False
