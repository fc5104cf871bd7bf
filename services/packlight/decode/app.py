"""The decode process: what it is made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import torch
from prometheus_client import CollectorRegistry

from packlight.core.config import Config
from packlight.core.types import Role
from packlight.decode.worker import DecodeWorker
from packlight.engine.build import build_model, build_runner
from packlight.engine.compute import Compute
from packlight.engine.host import WorkerProcess
from packlight.fleet.heart import worker_identity
from packlight.fleet.registry import build_fleet
from packlight.models.opened import open_model
from packlight.telemetry.metrics import DecodeMetrics
from packlight.wire.channel import Channels
from packlight.wire.decode import decode_handler
from packlight.wire.prefill import GrpcPrefillClient


async def serve(
    config: Config, environ: Mapping[str, str], stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    section = config.decode
    fleet = build_fleet(config.fleet, environ, time.monotonic)
    if section.threads:
        torch.set_num_threads(section.threads)
    opened = open_model(config.model, on_progress=on_progress)
    model = build_model(opened, config.model, Role.DECODE, on_progress=on_progress)
    registry, compute, channels = CollectorRegistry(), Compute("decode"), Channels()
    worker = DecodeWorker(
        section,
        build_runner(model, config.model.device, config.kv, section),
        compute,
        lambda worker_id, address: GrpcPrefillClient(channels.get(address), worker_id),
        metrics=DecodeMetrics(registry),
    )
    process = WorkerProcess(
        config,
        section,
        Role.DECODE,
        worker,
        decode_handler(worker),
        fleet,
        identity=worker_identity(Role.DECODE, section, environ),
        spec=model.spec,
        registry=registry,
        environ=environ,
    )
    try:
        await process.serve(stop, on_progress)
    finally:
        await channels.close()
        compute.close()
