"""A prefill worker that computes nothing, as a process of its own: `python -m packlight.bench.micro.measure.peer`.

Knows how to serve until its standard input ends, which it does when whoever started it is gone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from prometheus_client import CollectorRegistry

from packlight.bench.micro.measure.hollow import HollowModel, StoreOnly
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.credentials import open_credentials
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.models.opened import open_model
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from packlight.wire.channel import start_server
from packlight.wire.prefill import prefill_handler


@asynccontextmanager
async def hollow_prefill(config: Config) -> AsyncIterator[PrefillWorker]:
    """The worker, running. Its model has the shape of `config.model`."""
    spec = open_model(config.model, on_progress=_ignore).spec
    pool = KVPool.of_size(
        spec,
        memory_bytes=config.prefill.kv_memory_bytes,
        page_size=config.kv.page_size,
        dtype=getattr(torch, spec.dtype),
    )
    compute = Compute("hollow-prefill")
    runner = Runner(HollowModel(spec), pool, StoreOnly())
    worker = PrefillWorker(config.prefill, runner, compute, metrics=PrefillMetrics(CollectorRegistry()))
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        compute.close()


async def serve(config: Config) -> None:
    async with hollow_prefill(config) as worker:
        server, port = await start_server([prefill_handler(worker)], "127.0.0.1", 0, open_credentials(config.tls))
        print(f"hollow prefill worker is ready on 127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(grace=None)


def _ignore(line: str) -> None:
    """Nobody waits for this process to say how it gets on."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(serve(build_config({}, sys.argv[1:])))
