"""A device that a test drives, seen from its side stream: work is begun when it is told to be, and done when the test
says so, in that order. Steps do not wait for it, unless the computing stream was put behind it.

Pinned memory begins as poison, and is nobody's but the device's until the work that reads it is done: whoever fills it
again before that spoils what the device reads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from packlight.kv.lending import Bytes, pageable

POISON = 0xDB
PATIENCE_S = 30.0


class DeferredWork:
    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._error = work, None
        self._done = threading.Event()

    def finish(self) -> None:
        assert not self._done.is_set()
        self._work()
        self._end()

    def fail(self) -> None:
        self._error = RuntimeError("the device is gone")
        self._end()

    def _end(self) -> None:
        self._work = None
        self._done.set()

    def query(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._done.is_set()

    def synchronize(self) -> None:
        assert self._done.wait(PATIENCE_S), "the test never ended some work"
        if self._error is not None:
            raise self._error


class DeferredSide:
    """`begun` has the work that is not done yet. What computes calls `compute` first."""

    def __init__(self) -> None:
        self.begun: deque[DeferredWork] = deque()
        self.num_begun = self.num_allocated_bytes = 0
        self.refuses = False
        self.num_held = self.num_waiting = 0
        self._moment = 0
        self._before_computing: list[DeferredWork] = []

    def allocate(self, num_bytes: int) -> Bytes:
        self.num_allocated_bytes += num_bytes
        memory = pageable(num_bytes)
        memory[:] = POISON
        return memory

    def computed(self) -> int:
        self._moment += 1
        return self._moment

    def gone(self) -> int:
        raise RuntimeError("the device is gone")

    def run(self, work: Callable[[], object], after: int) -> DeferredWork:
        assert after == self._moment, "begun after an earlier moment than the last that was asked for"
        if self.refuses:
            self.gone()
        self.num_begun += 1
        self.begun.append(DeferredWork(work))
        return self.begun[-1]

    def hold_computing(self) -> None:
        self.num_held += 1
        self._before_computing = list(self.begun)

    def compute(self) -> None:
        """On the thread of steps: what was put before them is done when this returns."""
        self.num_waiting += 1
        for work in self._before_computing:
            work.synchronize()
        self.num_waiting -= 1

    def finish(self, num: int | None = None) -> None:
        """The next `num` of those that were begun, or all."""
        for _ in range(len(self.begun) if num is None else num):
            self.begun.popleft().finish()
