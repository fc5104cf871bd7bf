"""Running one worker as part of a fleet: its loop, its server, its heartbeat, and a clean end.

Knows both kinds of workers by what they share. Does not know what they compute. A part that dies takes the process with
it: half a worker must not look alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from packlight.core.errors import StartupError
from packlight.core.types import ModelSpec
from packlight.core.workers import LocalPrefill, Role, WorkerId, WorkerInfo, WorkerLoad
from packlight.engine.foundation import Foundation
from packlight.fleet.heart import Heart, advertised_address
from packlight.wire.channel import start_server

log = logging.getLogger(__name__)


class Worker(Protocol):
    draining: bool

    @property
    def compatibility(self) -> str: ...
    @property
    def num_unfinished(self) -> int: ...
    async def run(self) -> None: ...
    def load(self) -> WorkerLoad: ...
    def drain(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Identity:
    worker_id: WorkerId
    generation: int
    role: Role
    address: str
    speaks_tls: bool = False


def describe(
    identity: Identity,
    worker: Worker,
    spec: ModelSpec,
    page_size: int,
    revision: str = "",
    local_prefill: LocalPrefill | None = None,
) -> WorkerInfo:
    """What the worker puts on the fleet's board."""
    return WorkerInfo(
        worker_id=identity.worker_id,
        generation=identity.generation,
        role=identity.role,
        address=identity.address,
        model=spec.name,
        fingerprint=spec.fingerprint,
        compatibility=f"{worker.compatibility}/{revision}" if revision else worker.compatibility,
        page_size=page_size,
        max_context=spec.max_context,
        draining=worker.draining,
        load=worker.load(),
        local_prefill=local_prefill,
        speaks_tls=identity.speaks_tls,
    )


async def run_until(stop: asyncio.Event, *parts: Coroutine[Any, Any, None]) -> None:
    """Run `parts` until `stop` is set. Raises what a part raises; a part that returns is a bug of ours."""
    tasks = [asyncio.create_task(part) for part in parts]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)


async def drained(worker: Worker, timeout_s: float) -> bool:
    """Whether everything accepted has ended within `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            while worker.num_unfinished:  # noqa: ASYNC110 - once in a process's life; an event would cost every request
                await asyncio.sleep(0.02)
    except TimeoutError:
        return False
    return True


class WorkerProcess:
    """One worker behind a gRPC server. `serve` returns when `stop` was set and everything is finished or given up."""

    def __init__(
        self,
        base: Foundation,
        worker: Worker,
        handler: grpc.GenericRpcHandler,
        *,
        also: Callable[[], Awaitable[None]] | None = None,
        offer: Callable[[], LocalPrefill] | None = None,
    ) -> None:
        """`also` happens with every heartbeat; `offer` is what a decode worker says of its local prefill."""
        self._base, self._worker, self._handler, self._also, self._offer = base, worker, handler, also, offer
        self._section, self._health = base.section, base.http.health

    async def serve(
        self, stop: asyncio.Event, on_progress: Callable[[str], None], *beside: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Also runs `beside`, and watches the engine. Raises StartupError if a port cannot be had."""
        server, port = await self._listen()
        heart = self._heart(advertised_address(self._section, port, self._base.environ))
        try:
            on_progress(self._ready_message(port))
            self._health.serving(lambda: self._base.fleet.available)
            ended = asyncio.Event()
            parts = (self._worker.run, heart.run, self._base.engine.watch, *beside)
            await run_until(ended, self._drain_when(stop, ended, heart), *(part() for part in parts))
        finally:
            await heart.stop()
            await server.stop(grace=1.0)

    async def _listen(self) -> tuple[grpc.aio.Server, int]:
        try:
            return await start_server([self._handler], self._section.host, self._section.port, self._base.tls)
        except StartupError as error:
            hint = f"Choose another --set {self._base.role}.port=..., or 0 for a free one"
            raise StartupError(f"{error.message}. {hint}") from None

    def _ready_message(self, port: int) -> str:
        base, tls = self._base, " with TLS" if self._base.tls else ""
        metrics = f", metrics on {base.http.url}/metrics" if base.http.url else ""
        return f"{base.role} worker {base.identity[0]} is ready on {self._section.host}:{port}{tls}{metrics}"

    async def _drain_when(self, stop: asyncio.Event, ended: asyncio.Event, heart: Heart) -> None:
        await stop.wait()
        self._health.draining()
        self._worker.drain()
        await heart.beat()
        if not await drained(self._worker, self._section.drain_s):
            log.warning("giving up %d requests after %.0f s", self._worker.num_unfinished, self._section.drain_s)
        # Routers that have not read the board since shall find somebody who refuses: that is quicker than nobody.
        await asyncio.sleep(self._base.config.fleet.heartbeat_s)
        ended.set()
        await asyncio.Event().wait()

    def _heart(self, address: str) -> Heart:
        base, config = self._base, self._base.config
        worker_id, generation = base.identity
        identity = Identity(worker_id, generation, base.role, address, speaks_tls=base.tls is not None)
        page_size, revision = config.kv.page_size, base.environ.get("POD_REVISION", "")

        def say() -> WorkerInfo:
            offered = self._offer() if self._offer else None
            return describe(identity, self._worker, base.opened.spec, page_size, revision, offered)

        period_s, pulse = config.fleet.heartbeat_s, self._health.pulse
        return Heart(base.fleet, say, period_s=period_s, also=self._also, pulse=pulse)
