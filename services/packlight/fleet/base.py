"""The seam between workers that report themselves and whoever needs to know which are alive.

Knows what is asked of a registry, not how it is kept. The registry is a noticeboard: nothing is promised to a worker
by its being listed, and a request never waits for it (the router reads a copy, see `view.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from packlight.core.errors import CapacityError
from packlight.core.workers import WorkerId, WorkerInfo


class FleetAway(CapacityError):
    """The registry cannot be read now. What was read before is the best there is."""

    grpc_code = "UNAVAILABLE"
    openai_code = "registry_unavailable"
    retryable = True


@dataclass(frozen=True, slots=True)
class Sighting:
    """A worker's last heartbeat, and how long ago it was by the registry's own clock."""

    worker: WorkerInfo
    age_s: float


class Fleet(Protocol):
    """The registry of one fleet."""

    @property
    def available(self) -> bool:
        """False while the backend is away."""
        ...

    async def heartbeat(self, info: WorkerInfo) -> None:
        """The worker is alive and this is its state. Ignored if a newer generation of it is alive. Lost without an
        error while the backend is away: the next one makes up for it."""
        ...

    async def leave(self, worker_id: WorkerId, generation: int) -> None:
        """This generation, and older ones, will not be heard of again. Lost without an error while the backend is
        away: silence says the same a little later."""
        ...

    async def list(self) -> tuple[Sighting, ...]:
        """The workers that sent a heartbeat within `ttl_s`, the newest generation of each, ordered by id.

        Raises FleetAway while the backend is away."""
        ...

    async def close(self) -> None: ...
