"""The prefill process: what it is made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from packlight.core.config import Config
from packlight.core.workers import Role
from packlight.engine.compute import Compute
from packlight.engine.foundation import Foundation, open_foundation
from packlight.engine.host import WorkerProcess
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.registry import build_index
from packlight.telemetry.metrics import PrefillMetrics
from packlight.wire.prefill import prefill_handler


async def serve(
    config: Config, environ: Mapping[str, str], stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    index = build_index(config.index, environ, time.monotonic)
    try:
        async with open_foundation(config, Role.PREFILL, environ, on_progress) as base:
            await _serve(base, index, stop, on_progress)
    finally:
        await index.close()


async def _serve(base: Foundation, index: PrefixIndex, stop: asyncio.Event, on_progress: Callable[[str], None]) -> None:
    section, compute = base.config.prefill, Compute("prefill")
    metrics, tracer = PrefillMetrics(base.http.registry), base.traces.tracer(base.role, base.identity[0])
    runner = base.engine.prefill_runner(section)
    worker = PrefillWorker(section, runner, compute, metrics=metrics, grammars=base.grammars, tracer=tracer)
    holder = Holder(*base.identity)
    publisher = Publisher(index, base.opened.spec.fingerprint, holder, worker.blocks.cache.prefixes)
    worker.blocks.inventory = publisher
    process = WorkerProcess(base, worker, prefill_handler(worker), also=publisher.beat)
    try:
        await process.serve(stop, on_progress, publisher.run)
    finally:
        compute.close()
