"""The gate: how many requests are in the house, and whether another may come in.

Knows counts and time. Does not know HTTP. A request holds a slot from before its body is read until its answer is
sent; a request for n choices holds n.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Self

from packlight.core.errors import Draining, QueueFull

_SMOOTHING = 0.2
_MIN_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 0.1, 30.0


class Gate:
    """Admits up to `limit` at once, and nobody once `drain` was called. One owner, one event loop."""

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.num_inside = 0
        self.draining = False
        self._clock = clock
        self._mean_stay_s = 1.0
        self._slots: set[Slot] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> Slot:
        """A slot, to be used as a context manager. Raises Draining or QueueFull."""
        if self.draining:
            raise Draining("This server is shutting down. Please try again: another one will answer.")
        self._take(1)
        slot = Slot(self, self._clock())
        self._slots.add(slot)
        return slot

    def drain(self) -> None:
        """Admit nobody from now on. Those inside finish."""
        self.draining = True

    def give_up(self) -> None:
        """End those inside: there is no more time."""
        for slot in self._slots:
            slot._give_up()

    async def drained(self) -> None:
        """Returns when nobody is inside."""
        await self._empty.wait()

    def retry_after_s(self) -> float:
        """When a slot is likely to be free: by Little's law one leaves every (mean stay / number inside) seconds."""
        return min(max(self._mean_stay_s / max(self.num_inside, 1), _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

    def _take(self, num: int) -> None:
        if self.num_inside + num > self.limit:
            raise QueueFull(
                f"This server has {self.num_inside} of at most {self.limit} requests in progress. Please try again.",
                retry_after_s=self.retry_after_s(),
            )
        self.num_inside += num
        self._empty.clear()

    def _leave(self, slot: Slot, num: int, stay_s: float) -> None:
        self._slots.discard(slot)
        self.num_inside -= num
        self._mean_stay_s += _SMOOTHING * (stay_s - self._mean_stay_s)
        if self.num_inside == 0:
            self._empty.set()


class Slot:
    """The place of one request inside the gate."""

    def __init__(self, gate: Gate, entered_at: float) -> None:
        self._gate = gate
        self._entered_at = entered_at
        self._num = 1
        self._deadline: asyncio.Timeout | None = None
        self.is_given_up = False

    def grow(self, num: int) -> None:
        """Hold `num` places. Raises QueueFull, and holds what it held."""
        self._gate._take(num - self._num)
        self._num = num

    def ends_with(self, deadline: asyncio.Timeout) -> None:
        """What the request runs under: it expires early when the gate gives up on those inside."""
        self._deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gate._leave(self, self._num, self._gate._clock() - self._entered_at)

    def _give_up(self) -> None:
        self.is_given_up = True
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0.0)
