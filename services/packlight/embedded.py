"""Everything in one process: router, prefill and decode on a laptop.

A composition root, like `cli.py`: it knows every package. The code paths are those of the real processes; only the
seams differ - index and fleet in memory, clients and transport in-process, one copy of the weights, one compute
thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import torch
from prometheus_client import CollectorRegistry

from packlight.core.config import Config, FleetConfig, IndexConfig
from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec
from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.decode.worker import DecodeWorker
from packlight.engine.build import build_model, build_runner
from packlight.engine.compute import Compute
from packlight.engine.host import Identity, Worker, describe, run_until
from packlight.fleet.base import Fleet
from packlight.fleet.heart import Heart
from packlight.fleet.registry import build_fleet
from packlight.fleet.view import FleetView
from packlight.models.grammar import open_grammars
from packlight.models.opened import OpenedModel, open_model
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder
from packlight.prefix.registry import build_index
from packlight.router.app import build_app
from packlight.router.clients import LocalDecodeClients
from packlight.router.pipeline import Pipeline
from packlight.router.server import listen, ready_message, serve_http
from packlight.router.service import ServedModel
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from packlight.telemetry.traces import open_traces

PREFILL_ID, DECODE_ID = "prefill", "decode"


class Embedded:
    """All three roles. `run` keeps them alive; `app` is the router's. Create it on the event loop."""

    def __init__(self, config: Config, opened: OpenedModel, on_progress: Callable[[str], None]) -> None:
        _refuse_division(config)
        self._config, self._registry = config, CollectorRegistry()
        self._traces = open_traces(config.telemetry)
        self._compute = Compute(max_stall_s=config.decode.max_stall_s)
        self.prefill, self.decode = self._make_workers(opened, on_progress)
        self.index = build_index(IndexConfig(backend="memory"), {}, time.monotonic)
        holder = Holder(PREFILL_ID, 1)
        self._publisher = Publisher(self.index, opened.spec.fingerprint, holder, self.prefill.blocks.cache.prefixes)
        self.prefill.blocks.inventory = self._publisher
        fleet = build_fleet(FleetConfig(backend="memory", ttl_s=config.fleet.ttl_s), {}, time.monotonic)
        self._hearts = self._make_hearts(fleet, opened.spec)
        poll_s, suspect_s = config.fleet.heartbeat_s, config.fleet.ttl_s
        self.view = FleetView(fleet, poll_s=poll_s, suspect_s=suspect_s, clock=time.monotonic)
        metrics, tracer = RouterMetrics(self._registry), self._traces.tracer("router", "router")
        clients = LocalDecodeClients({DECODE_ID: self.decode})
        self.pipeline = Pipeline(config.router, opened.spec, self.index, self.view, clients, metrics, tracer=tracer)
        self.app = build_app(config, ServedModel(opened.spec, opened.tokenizer), self.pipeline, metrics, tracer=tracer)

    async def start(self) -> None:
        """Both workers are on the board, and the router has seen them."""
        for heart in self._hearts:
            await heart.beat()
        await self.view.start()

    async def run(self) -> None:
        """For ever, or until a part dies."""
        forever = asyncio.Event()
        hearts = [heart.run() for heart in self._hearts]
        await run_until(forever, self.prefill.run(), self.decode.run(), self._publisher.run(), *hearts)

    async def close(self) -> None:
        await self.view.close()
        self._compute.close()
        await asyncio.to_thread(self._traces.close)

    def _make_workers(
        self, opened: OpenedModel, on_progress: Callable[[str], None]
    ) -> tuple[PrefillWorker, DecodeWorker]:
        config, device = self._config, self._config.model.device
        if config.prefill.threads or config.decode.threads:
            torch.set_num_threads(max(config.prefill.threads or 1, config.decode.threads or 1))
        model = build_model(opened, config.model, Role.PREFILL, on_progress=on_progress)
        # The fake model computes differently by role; a real one is shared.
        twin = model if opened.folder else build_model(opened, config.model, Role.DECODE, on_progress=on_progress)
        grammars = open_grammars(opened.tokenizer, opened.spec)
        prefill = PrefillWorker(
            config.prefill,
            build_runner(model, device, config.kv, config.prefill),
            self._compute,
            metrics=PrefillMetrics(self._registry),
            grammars=grammars,
            tracer=self._traces.tracer(Role.PREFILL, PREFILL_ID),
        )
        decode = DecodeWorker(
            config.decode,
            build_runner(twin, device, config.kv, config.decode),
            self._compute,
            lambda worker_id, address: prefill,
            metrics=DecodeMetrics(self._registry),
            grammars=grammars,
            tracer=self._traces.tracer(Role.DECODE, DECODE_ID),
        )
        decode.prepare(on_progress)
        return prefill, decode

    def _make_hearts(self, fleet: Fleet, spec: ModelSpec) -> tuple[Heart, Heart]:
        page_size, period_s = self._config.kv.page_size, self._config.fleet.heartbeat_s

        def say(worker_id: WorkerId, role: Role, worker: Worker) -> Callable[[], WorkerInfo]:
            return partial(describe, Identity(worker_id, 1, role, "in-process"), worker, spec, page_size)

        prefill, decode = say(PREFILL_ID, Role.PREFILL, self.prefill), say(DECODE_ID, Role.DECODE, self.decode)
        return (
            Heart(fleet, prefill, period_s=period_s, also=self._publisher.beat),
            Heart(fleet, decode, period_s=period_s),
        )


def _refuse_division(config: Config) -> None:
    for role, section in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode)):
        if section.tensor_parallel > 1:
            raise ConfigError(
                f"{role}.tensor_parallel={section.tensor_parallel}: `packlight serve` is one process. Start "
                "`packlight router` and `packlight decode`, with or without `packlight prefill`"
            )


async def serve(config: Config, stop: asyncio.Event, on_progress: Callable[[str], None]) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    with listen(config.router) as bound:  # before the model is loaded: a taken port should not take minutes to notice
        opened = open_model(config.model, on_progress=on_progress)
        embedded = Embedded(config, opened, on_progress)
        await embedded.start()
        engine = asyncio.create_task(embedded.run())
        http = asyncio.create_task(serve_http(embedded.app, config.router, bound, stop))
        on_progress(ready_message(bound, opened.spec.name))
        try:
            await asyncio.wait([engine, http], return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                engine.result()
            await http
        finally:
            engine.cancel()
            http.cancel()
            await asyncio.gather(engine, http, return_exceptions=True)
            await embedded.close()
