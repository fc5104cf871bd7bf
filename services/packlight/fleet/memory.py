"""The registry of a fleet that lives in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packlight.core.config import FleetConfig
from packlight.core.workers import WorkerId, WorkerInfo
from packlight.fleet.base import Sighting


class MemoryFleet:
    """Fleet in this process's memory. Always available. `clock` is in seconds."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._heard: dict[WorkerId, tuple[WorkerInfo, float]] = {}

    @property
    def available(self) -> bool:
        return True

    async def heartbeat(self, info: WorkerInfo) -> None:
        self._forget_silent()
        known = self._heard.get(info.worker_id)
        if known is None or known[0].generation <= info.generation:
            self._heard[info.worker_id] = (info, self._clock())

    async def leave(self, worker_id: WorkerId, generation: int) -> None:
        known = self._heard.get(worker_id)
        if known is not None and known[0].generation <= generation:
            del self._heard[worker_id]

    async def list(self) -> tuple[Sighting, ...]:
        self._forget_silent()
        now = self._clock()
        return tuple(Sighting(info, now - heard_at) for _, (info, heard_at) in sorted(self._heard.items()))

    async def close(self) -> None:
        self._heard.clear()

    def _forget_silent(self) -> None:
        oldest = self._clock() - self._ttl_s
        self._heard = {worker_id: heard for worker_id, heard in self._heard.items() if heard[1] > oldest}


def build(config: FleetConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> MemoryFleet:
    return MemoryFleet(config.ttl_s, clock)
