"""A worker's heartbeat: who it is, that it lives, and how loaded it is.

Knows the registry and a clock's pace. Does not know what the worker does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

from packlight.core.config import WorkerSection
from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.fleet.base import Fleet

log = logging.getLogger(__name__)


def worker_identity(role: Role, section: WorkerSection, environ: Mapping[str, str]) -> tuple[WorkerId, int]:
    """(worker id, generation). The generation is the start time in milliseconds: it grows with every restart."""
    worker_id = section.worker_id or environ.get("POD_NAME") or f"{role}-{socket.gethostname()}-{os.getpid()}"
    return worker_id, time.time_ns() // 1_000_000


def advertised_address(section: WorkerSection, port: int, environ: Mapping[str, str]) -> str:
    """Where other processes reach this worker: `host:port`, an IPv6 host in brackets."""
    host = section.advertise or environ.get("POD_IP") or section.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    is_bare_ipv6 = host.count(":") > 1 and not host.startswith("[")
    if is_bare_ipv6:
        host = f"[{host}]"
    has_port = ":" in host.rpartition("]")[2]
    return host if has_port else f"{host}:{port}"


class Heart:
    """Reports `describe()` every `period_s`, and `also` with it; `stop` takes the worker off the board. `pulse` is
    called whatever becomes of the report: the event loop goes round."""

    def __init__(
        self,
        fleet: Fleet,
        describe: Callable[[], WorkerInfo],
        *,
        period_s: float,
        also: Callable[[], Awaitable[None]] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._fleet, self._describe, self._period_s, self._also, self._pulse = fleet, describe, period_s, also, pulse

    async def beat(self) -> None:
        await self._fleet.heartbeat(self._describe())
        if self._also is not None:
            await self._also()

    async def run(self) -> None:
        while True:
            self._pulse()
            try:
                await self.beat()
            except Exception:
                log.exception("a heartbeat failed")
            await asyncio.sleep(self._period_s)

    async def stop(self) -> None:
        info = self._describe()
        await self._fleet.leave(info.worker_id, info.generation)
