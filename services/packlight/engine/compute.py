"""The one thread on which a process computes.

Knows how to run a function there and await it. Steps of all workers that share a `Compute` take turns, first come first
served: on a laptop, where prefill and decode live in one process, two steps at once would fight for the same cores
(measured: 4x slower), and a long prefill chunk delays decode by one chunk at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Compute:
    def __init__(self, name: str = "packlight-compute") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
