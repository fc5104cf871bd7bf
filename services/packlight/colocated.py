"""The decode process: a decode worker, and beside it a small prefill worker for prompts not worth sending away.

A composition root, like `embedded.py`: decode and prefill know nothing of each other. The two share weights, compute
thread and metrics port. To the decode worker the other is a prefill worker like any, only nearer. To the fleet it is
something that this decode worker offers (`LocalPrefill`), under a name of its own in the prefix index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from packlight.core.config import Config, PrefillConfig
from packlight.core.workers import LocalPrefill, Role, WorkerId
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.engine import Engine, open_engine
from packlight.engine.foundation import Foundation, open_foundation
from packlight.engine.host import WorkerProcess, run_until
from packlight.models.grammar import Grammars
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.registry import build_index
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from packlight.telemetry.traces import NO_TRACER, Traces
from packlight.wire.channel import Channels, Dialer
from packlight.wire.decode import decode_handler
from packlight.wire.prefill import GrpcPrefillClient


def local_id(decode_id: WorkerId) -> WorkerId:
    """What the prefill worker beside a decode worker is called."""
    return f"{decode_id}/prefill"


class PrefillBeside:
    """The prefill worker of a decode process. Create it on the event loop."""

    def __init__(
        self,
        config: Config,
        identity: tuple[WorkerId, int],
        engine: Engine,
        compute: Compute,
        index: PrefixIndex,
        metrics: PrefillMetrics,
        traces: Traces | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`identity` is the decode worker's id and generation. Raises ConfigError if not one block fits."""
        holder = Holder(local_id(identity[0]), identity[1])
        section = _section(config)
        self.worker_id, self._max_stall_s = holder.worker_id, config.decode.max_stall_s
        runner = engine.prefill_runner(section)
        tracer = traces.tracer(Role.PREFILL, self.worker_id) if traces else NO_TRACER
        self.worker = PrefillWorker(section, runner, compute, metrics=metrics, grammars=grammars, tracer=tracer)
        fingerprint = runner.model.spec.fingerprint
        self._publisher = Publisher(index, fingerprint, holder, self.worker.blocks.cache.prefixes)
        self.worker.blocks.inventory = self._publisher

    def offer(self) -> LocalPrefill:
        return LocalPrefill(self.worker_id, self.worker.max_tokens, self._max_stall_s, self.worker.load())

    async def beat(self) -> None:
        await self._publisher.beat()

    async def run(self) -> None:
        """For ever, or until a part dies."""
        await run_until(asyncio.Event(), self.worker.run(), self._publisher.run())


async def serve(
    config: Config, environ: Mapping[str, str], stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    prefills = config.decode.local_prefill.kv_memory_bytes > 0
    index = build_index(config.index, environ, time.monotonic) if prefills else None
    try:
        async with open_foundation(config, Role.DECODE, environ, on_progress) as base:
            await _serve(base, index, stop, on_progress)
    finally:
        if index is not None:
            await index.close()


async def _serve(
    base: Foundation, index: PrefixIndex | None, stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    section, channels = base.config.decode, Channels(Dialer(base.tls))
    compute = Compute("decode", max_stall_s=section.max_stall_s)
    beside = _prefill_beside(base, compute, index, on_progress) if index is not None else None

    def prefill_client(worker_id: WorkerId, address: str) -> PrefillWorker | GrpcPrefillClient:
        if beside is not None and worker_id == beside.worker_id:
            return beside.worker
        return GrpcPrefillClient(channels.get(address), worker_id)

    metrics, tracer = DecodeMetrics(base.http.registry), base.traces.tracer(base.role, base.identity[0])
    runner = base.engine.decode_runner(section)
    worker = DecodeWorker(
        section, runner, compute, prefill_client, metrics=metrics, grammars=base.grammars, tracer=tracer
    )
    worker.prepare(on_progress)
    also, offer = (beside.beat, beside.offer) if beside else (None, None)
    process = WorkerProcess(base, worker, decode_handler(worker), also=also, offer=offer)
    try:
        await process.serve(stop, on_progress, *([beside.run] if beside else []))
    finally:
        await channels.close()
        compute.close()


def _prefill_beside(
    base: Foundation, compute: Compute, index: PrefixIndex, on_progress: Callable[[str], None]
) -> PrefillBeside:
    config, opened, metrics = base.config, base.opened, PrefillMetrics(base.http.registry)
    # The fake model computes differently by role; a real one is shared.
    twin = base.engine if opened.folder else open_engine(opened, config, Role.PREFILL, on_progress=on_progress)
    return PrefillBeside(config, base.identity, twin, compute, index, metrics, base.traces, base.grammars)


def _section(config: Config) -> PrefillConfig:
    """How the fleet prefills, within what a decode worker has."""
    decode = config.decode
    mine = {"kv_memory_bytes": decode.local_prefill.kv_memory_bytes}
    return config.prefill.model_copy(update=mine | {"attention": decode.attention, "max_queue": decode.max_queue})
