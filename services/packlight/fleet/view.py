"""The router's copy of the registry: always there, a heartbeat old at most, and older while the registry is away.

Knows who was listed last and who failed to answer since. Does not choose a worker and opens no connection. Everything
the router asks is answered from memory; only `refresh` waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.fleet.base import Fleet, FleetAway, Sighting

log = logging.getLogger(__name__)

OnVanished = Callable[[WorkerInfo], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Suspicion:
    generation: int
    since: float


class FleetView:
    """Polls `fleet` every `poll_s`. A suspicion lasts `suspect_s` at most. `clock` is monotonic, in seconds.

    `on_vanished` is awaited for every worker that is listed no more, or only in a newer generation.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        poll_s: float,
        suspect_s: float,
        clock: Callable[[], float],
        on_vanished: OnVanished | None = None,
    ) -> None:
        self._fleet = fleet
        self._poll_s = poll_s
        self._suspect_s = suspect_s
        self._clock = clock
        self._on_vanished = on_vanished
        self._workers: dict[WorkerId, WorkerInfo] = {}
        self._suspicions: dict[WorkerId, _Suspicion] = {}
        self._available: bool | None = None  # None: never polled
        self._task: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Whether the last poll succeeded. If not, the workers are those of the last one that did."""
        return bool(self._available)

    def workers(self, role: Role | None = None) -> tuple[WorkerInfo, ...]:
        """The workers of a role (None: of every role) worth trying, draining ones included. Suspects are left out
        unless nobody else would take a request."""
        known = tuple(worker for worker in self._workers.values() if role in (None, worker.role))
        trusted = tuple(worker for worker in known if not self.is_suspect(worker))
        return trusted if any(not worker.draining for worker in trusted) else known

    def is_suspect(self, worker: WorkerInfo) -> bool:
        suspicion = self._suspicions.get(worker.worker_id)
        if suspicion is None or worker.generation > suspicion.generation:
            return False
        return self._clock() - suspicion.since < self._suspect_s

    def suspect(self, worker_id: WorkerId, generation: int) -> None:
        """A connection to this worker failed. A heartbeat it sends later, or a restart, clears it."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.generation <= generation:
            self._suspicions[worker_id] = _Suspicion(generation, self._clock())

    async def refresh(self) -> None:
        """One poll. Keeps what it has if the registry is away."""
        asked_at = self._clock()
        try:
            sightings = await self._fleet.list()
        except FleetAway as error:
            if self._available is not False:
                log.warning("%s: going on with the %d workers known", error, len(self._workers))
            self._available = False
            return
        self._available = True
        for worker in self._adopt(sightings, asked_at):
            if self._on_vanished is not None:
                await self._on_vanished(worker)

    async def start(self) -> None:
        """The first poll, then one every `poll_s` in a task of its own until `close`."""
        await self.refresh()
        self._task = asyncio.create_task(self._poll(), name="fleet-view")

    async def close(self) -> None:
        """Stop polling. The registry itself is the caller's to close."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("a poll of the fleet registry failed")

    def _adopt(self, sightings: tuple[Sighting, ...], asked_at: float) -> list[WorkerInfo]:
        """Take over a listing asked for at `asked_at`. Returns the workers of the last one that are gone."""
        workers = {sighting.worker.worker_id: sighting.worker for sighting in sightings}
        for sighting in sightings:
            suspicion = self._suspicions.get(sighting.worker.worker_id)
            if suspicion is not None and asked_at - sighting.age_s > suspicion.since:
                del self._suspicions[sighting.worker.worker_id]
        gone = [worker for worker in self._workers.values() if not _is_continued(worker, workers)]
        for worker in gone:
            self._suspicions.pop(worker.worker_id, None)
        self._workers = workers
        return gone


def _is_continued(worker: WorkerInfo, workers: dict[WorkerId, WorkerInfo]) -> bool:
    now = workers.get(worker.worker_id)
    return now is not None and now.generation == worker.generation
