"""The one thread on which a process computes, and whose turn it is there.

Knows how to run a function there and await it. Steps of all workers that share a `Compute` take turns: on a laptop,
where prefill and decode live in one process, two steps at once would fight for the same cores (measured: 4x slower).

A decode step gives every running answer its next token; a prefill step gives one answer its first. So decode steps go
first: while answers are running, a prefill step may take `max_stall_s` (the prefill worker cuts its chunks to that),
and between two prefill steps there is always a decode step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")


class Decoding(IntEnum):
    """What the decode worker on this thread is about: nothing; answers whose KV is arriving; answers that run."""

    NO = 0
    SOON = 1
    NOW = 2


@dataclass(frozen=True, slots=True)
class Ran(Generic[T]):
    """A step that ran: it waited `waited_s` for the thread and took `took_s`."""

    result: T
    waited_s: float
    took_s: float


class Compute:
    """Use it on one event loop. `max_stall_s` is the longest that running answers are to wait for a prefill step."""

    def __init__(self, name: str = "packlight-compute", *, max_stall_s: float = 0.2) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._max_stall_s = max_stall_s
        self._decoding = Decoding.NO
        self._owes_turn = False  # a prefill step was submitted, and no decode step since
        self._changed = asyncio.Event()

    @property
    def max_prefill_s(self) -> float | None:
        """How long a prefill step may take now; None when it keeps nobody waiting."""
        return None if self._decoding is Decoding.NO else self._max_stall_s

    def set_decoding(self, decoding: Decoding) -> None:
        """Said by the decode worker whenever it changes."""
        self._decoding = decoding
        self._changed.set()

    async def decode(self, step: Callable[[], T]) -> Ran[T]:
        """Run `step` next, or right after the prefill step that is running."""
        self._owes_turn = False
        self._changed.set()
        return await self._run(step)

    async def prefill(self, step: Callable[[], T]) -> Ran[T]:
        """Run `step` after at least one decode step since the last prefill step, if answers are running."""
        while self._owes_turn and self._decoding is Decoding.NOW:
            self._changed.clear()
            await self._changed.wait()
        self._owes_turn = True
        return await self._run(step)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _run(self, step: Callable[[], T]) -> Ran[T]:
        submitted = time.perf_counter()

        def timed() -> Ran[T]:
            started = time.perf_counter()
            result = step()
            return Ran(result, started - submitted, time.perf_counter() - started)

        # First submitted, first run: a decode step that is submitted while a prefill step runs is the next.
        return await asyncio.get_running_loop().run_in_executor(self._executor, timed)
