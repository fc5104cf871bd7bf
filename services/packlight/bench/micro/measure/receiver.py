"""The receiving end of a transport benchmark: a decode worker that takes KV in and computes nothing with it.

Knows the worker from outside: a request goes in, and its events and timings come out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry

from packlight.bench.micro.measure.hollow import HollowModel, StoreOnly
from packlight.bench.micro.measure.processes import WorkerProcess
from packlight.core.config import Config
from packlight.core.credentials import open_credentials
from packlight.core.errors import InternalError
from packlight.core.shipping import PrefillClient
from packlight.core.types import (
    Failed,
    GenerateRequest,
    ModelSpec,
    PackSpec,
    Progress,
    SamplingParams,
    StopRules,
    Timings,
    Usage,
)
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.runner import DecodeRunner
from packlight.kv.pool import KVPool, block_bytes
from packlight.telemetry.metrics import DecodeMetrics
from packlight.wire.channel import Channels, Dialer
from packlight.wire.prefill import GrpcPrefillClient

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Shipment:
    """One request's. `ready_s` is from asking until the decode worker holds all pages, `cpu_s` that of both processes;
    NaN where the other's cannot be known."""

    ready_s: float
    cpu_s: float
    shipped_bytes: int
    timings: Timings

    @property
    def exposed_s(self) -> float:
        """What a prompt's prefill did not hide: from the end of its last step, first token included, until the last
        page was here; the request's own way to the prefill worker counts as well."""
        times = self.timings
        return max(0.0, self.ready_s - times.decode_queue_s - times.prefill_queue_s - times.prefill_s)

    @property
    def sending_s(self) -> float:
        """Of a prompt that nothing is computed of: `ready_s` without what packing took on the compute thread. Sending
        overlaps with packing, so it takes longer than this."""
        return max(0.0, self.ready_s - self.timings.select_s)

    @property
    def gbs(self) -> float:
        return self.shipped_bytes / self.ready_s / 1e9

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_s / (self.shipped_bytes / GIB)


class Receiver:
    """A decode worker that takes shipments in and computes nothing."""

    def __init__(self, worker: DecodeWorker, other_cpu_s: Callable[[], float]) -> None:
        """`other_cpu_s` is the CPU time of the other process so far; 0 where there is none."""
        self._worker, self._other_cpu_s = worker, other_cpu_s
        self._num_requests = 0

    async def fetch(self, token_ids: tuple[int, ...], pack: PackSpec, salt: str) -> Shipment:
        """Ask for a prompt, packed so. Prompts with the same salt share what is cached of them."""
        self._num_requests += 1
        request = _request(f"bench-{self._num_requests}", token_ids, pack, salt)
        started, cpu_s = time.perf_counter(), self._cpu_s()
        async with aclosing(self._worker.generate(request)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Progress) and event.usage.kv.exact_bytes:  # known with the last layer
                    ready_s = time.perf_counter() - started
                    return _shipment(ready_s, self._cpu_s() - cpu_s, event.usage)
        raise InternalError("the answer ended without its KV having arrived")

    def _cpu_s(self) -> float:
        return time.process_time() + self._other_cpu_s()


@asynccontextmanager
async def receiver(
    config: Config,
    spec: ModelSpec,
    transport: str,
    max_tokens: int,
    peer: PrefillClient | WorkerProcess,
) -> AsyncIterator[Receiver]:
    """A decode worker with room for prompts of `max_tokens`, which takes `transport` only and asks `peer`."""
    dtype, page_size = getattr(torch, spec.dtype), config.kv.page_size
    num_bytes = block_bytes(spec, page_size, dtype) * (2 * math.ceil(max_tokens / page_size) + 2)
    pool = KVPool.of_size(spec, memory_bytes=num_bytes, page_size=page_size, dtype=dtype)
    section = config.decode.model_copy(update={"transports": [transport], "max_batch": 2})
    compute, channels = Compute("hollow-decode"), Channels(Dialer(open_credentials(config.tls)))
    client = GrpcPrefillClient(channels.get(peer.address), "prefill") if isinstance(peer, WorkerProcess) else peer
    worker = DecodeWorker(
        section,
        DecodeRunner(HollowModel(spec), pool, StoreOnly()),
        compute,
        lambda worker_id, address: client,
        metrics=DecodeMetrics(CollectorRegistry()),
    )
    running = asyncio.create_task(worker.run())
    try:
        yield Receiver(worker, peer.cpu_s if isinstance(peer, WorkerProcess) else _no_other_process)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channels.close()
        compute.close()


def _no_other_process() -> float:
    return 0.0


def _request(request_id: str, token_ids: tuple[int, ...], pack: PackSpec, salt: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(temperature=0.0),
        stop=StopRules(max_tokens=2, ignore_eos=True),
        pack=pack,
        cache_salt=salt,
        prefill_id="prefill",
        deadline_s=600.0,
    )


def _shipment(ready_s: float, cpu_s: float, usage: Usage) -> Shipment:
    return Shipment(ready_s, cpu_s, usage.kv.shipped_bytes, usage.timings)
