"""Telling the fleet-wide prefix index what this worker's radix cache holds.

Knows what was stored and what was lost, in order. One task sends it, so the worker never waits for the index; when the
index lost its memory (its epoch changed), everything is told again. When the index is slower than the worker for too
long, what waits is thrown away, and with the next heartbeat the index is made to forget and is told everything again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from packlight.core.hashing import PageHash
from packlight.kv.radix import Eviction
from packlight.prefix.base import Holder, PrefixIndex

MAX_PENDING = 10_000


class Publisher:
    """`inventory()` lists every prefix held now. An `Inventory`."""

    def __init__(
        self,
        index: PrefixIndex,
        fingerprint: str,
        holder: Holder,
        inventory: Callable[[], Iterable[list[PageHash]]],
    ) -> None:
        self._index, self._fingerprint, self._holder, self._inventory = index, fingerprint, holder, inventory
        self._pending: deque[Eviction] = deque()
        self._most_pending = MAX_PENDING
        self._is_behind = False
        self._wake = asyncio.Event()
        self._epoch: int | None = None

    def stored(self, hashes: Sequence[PageHash]) -> None:
        """The whole path is held."""
        self._push(Eviction(list(hashes), keep=len(hashes)))

    def evicted(self, lost: Sequence[Eviction]) -> None:
        for eviction in lost:
            self._push(eviction)

    async def beat(self) -> None:
        """With every heartbeat: ask whether the index still knows us, and start over if it does not."""
        if self._is_behind:
            await self._index.drop_worker(self._fingerprint, self._holder.worker_id, self._holder.generation)
        epoch = await self._index.enroll(self._fingerprint, self._holder)
        if epoch != self._epoch:
            self._epoch = epoch
            self._start_over()

    async def run(self) -> None:
        while True:
            while self._pending:
                await self._send(self._pending.popleft())
            self._wake.clear()
            await self._wake.wait()

    async def _send(self, change: Eviction) -> None:
        if change.keep == len(change.hashes):
            await self._index.insert(self._fingerprint, self._holder, change.hashes)
        else:
            await self._index.remove(self._fingerprint, self._holder, change.hashes, change.keep)

    def _start_over(self) -> None:
        # What waits stays in front of the inventory: it may withdraw a claim that is on its way.
        self._pending.extend(Eviction(hashes, keep=len(hashes)) for hashes in self._inventory())
        self._most_pending = len(self._pending) + MAX_PENDING
        self._is_behind = False
        self._wake.set()

    def _push(self, change: Eviction) -> None:
        if len(self._pending) >= self._most_pending:
            self._pending.clear()
            self._is_behind = True
            return
        self._pending.append(change)
        self._wake.set()
