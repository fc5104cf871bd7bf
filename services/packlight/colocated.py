"""The decode process: a decode worker, and beside it a small prefill worker for prompts not worth sending away.

A composition root, like `embedded.py`: decode and prefill know nothing of each other. The two share weights, compute
thread and metrics port. To the decode worker the other is a prefill worker like any, only nearer. To the fleet it is
something that this decode worker offers (`LocalPrefill`), under a name of its own in the prefix index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import torch

from packlight.core.config import Config, PrefillConfig
from packlight.core.types import LocalPrefill, Role, WorkerId
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.engine import Engine, open_engine
from packlight.engine.health import HealthServer
from packlight.engine.host import WorkerProcess, run_until
from packlight.fleet.heart import worker_identity
from packlight.fleet.registry import build_fleet
from packlight.models.opened import open_model
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.registry import build_index
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from packlight.telemetry.traces import NO_TRACER, Traces, open_traces
from packlight.wire.channel import Channels
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
    ) -> None:
        """`identity` is the decode worker's id and generation. Raises ConfigError if not one block fits."""
        holder = Holder(local_id(identity[0]), identity[1])
        section = _section(config)
        self.worker_id, self._max_stall_s = holder.worker_id, config.decode.max_stall_s
        runner = engine.prefill_runner(section)
        tracer = traces.tracer(Role.PREFILL, self.worker_id) if traces else NO_TRACER
        self.worker = PrefillWorker(section, runner, compute, metrics=metrics, tracer=tracer)
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
    with HealthServer(Role.DECODE, config.decode) as http:
        await _serve(config, environ, stop, on_progress, http)


async def _serve(
    config: Config,
    environ: Mapping[str, str],
    stop: asyncio.Event,
    on_progress: Callable[[str], None],
    http: HealthServer,
) -> None:
    section, traces = config.decode, open_traces(config.telemetry)
    identity = worker_identity(Role.DECODE, section, environ)
    fleet = build_fleet(config.fleet, environ, time.monotonic)
    index = build_index(config.index, environ, time.monotonic) if section.local_prefill.kv_memory_bytes else None
    if section.threads:
        torch.set_num_threads(section.threads)
    opened = open_model(config.model, on_progress=on_progress)
    engine = open_engine(opened, config, Role.DECODE, on_progress=on_progress)
    channels = Channels()
    compute, beside = Compute("decode", max_stall_s=section.max_stall_s), None
    if index is not None:
        # The fake model computes differently by role; a real one is shared.
        twin = engine if opened.folder else open_engine(opened, config, Role.PREFILL, on_progress=on_progress)
        beside = PrefillBeside(config, identity, twin, compute, index, PrefillMetrics(http.registry), traces)

    def prefill_client(worker_id: WorkerId, address: str) -> PrefillWorker | GrpcPrefillClient:
        if beside is not None and worker_id == beside.worker_id:
            return beside.worker
        return GrpcPrefillClient(channels.get(address), worker_id)

    runner = engine.decode_runner(section)
    metrics, tracer = DecodeMetrics(http.registry), traces.tracer(Role.DECODE, identity[0])
    worker = DecodeWorker(section, runner, compute, prefill_client, metrics=metrics, tracer=tracer)
    worker.prepare(on_progress)
    process = WorkerProcess(
        config,
        section,
        Role.DECODE,
        worker,
        decode_handler(worker),
        fleet,
        identity=identity,
        spec=opened.spec,
        http=http,
        environ=environ,
        also=beside.beat if beside else None,
        offer=beside.offer if beside else None,
    )
    try:
        await process.serve(stop, on_progress, engine.watch, *([beside.run] if beside else []))
    finally:
        await channels.close()
        if index is not None:
            await index.close()
        compute.close()
        engine.close()
        await asyncio.to_thread(traces.close)


def _section(config: Config) -> PrefillConfig:
    """How the fleet prefills, within what a decode worker has."""
    decode = config.decode
    mine = {"kv_memory_bytes": decode.local_prefill.kv_memory_bytes}
    return config.prefill.model_copy(update=mine | {"attention": decode.attention, "max_queue": decode.max_queue})
