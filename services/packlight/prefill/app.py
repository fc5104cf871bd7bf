"""The prefill process: what it is made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import torch

from packlight.core.config import Config
from packlight.core.types import Role
from packlight.engine.compute import Compute
from packlight.engine.engine import open_engine
from packlight.engine.health import HealthServer
from packlight.engine.host import WorkerProcess
from packlight.fleet.heart import worker_identity
from packlight.fleet.registry import build_fleet
from packlight.models.opened import open_model
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder
from packlight.prefix.registry import build_index
from packlight.telemetry.metrics import PrefillMetrics
from packlight.telemetry.traces import open_traces
from packlight.wire.prefill import prefill_handler


async def serve(
    config: Config, environ: Mapping[str, str], stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    with HealthServer(Role.PREFILL, config.prefill) as http:
        await _serve(config, environ, stop, on_progress, http)


async def _serve(
    config: Config,
    environ: Mapping[str, str],
    stop: asyncio.Event,
    on_progress: Callable[[str], None],
    http: HealthServer,
) -> None:
    section, traces = config.prefill, open_traces(config.telemetry)
    fleet = build_fleet(config.fleet, environ, time.monotonic)
    index = build_index(config.index, environ, time.monotonic)
    if section.threads:
        torch.set_num_threads(section.threads)
    opened = open_model(config.model, on_progress=on_progress)
    engine = open_engine(opened, config, Role.PREFILL, on_progress=on_progress)
    compute = Compute("prefill")
    runner = engine.prefill_runner(section)
    identity = worker_identity(Role.PREFILL, section, environ)
    tracer = traces.tracer(Role.PREFILL, identity[0])
    worker = PrefillWorker(section, runner, compute, metrics=PrefillMetrics(http.registry), tracer=tracer)
    publisher = Publisher(index, opened.spec.fingerprint, Holder(*identity), worker.blocks.cache.prefixes)
    worker.blocks.inventory = publisher
    process = WorkerProcess(
        config,
        section,
        Role.PREFILL,
        worker,
        prefill_handler(worker),
        fleet,
        identity=identity,
        spec=opened.spec,
        http=http,
        environ=environ,
        also=publisher.beat,
    )
    try:
        await process.serve(stop, on_progress, publisher.run, engine.watch)
    finally:
        await index.close()
        compute.close()
        engine.close()
        await asyncio.to_thread(traces.close)
