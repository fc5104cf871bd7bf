"""A prefill and a decode worker around the arithmetic model, in one process: all but the model is real."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry

from packlight.attention.reference import ReferenceAttention
from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.shipping import PrefillClient
from packlight.core.types import Finished, GenerateRequest, PackSpec, SamplingParams, StopRules, Tokens, is_terminal
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS, FakeModel
from packlight.models.fake_spec import FakeTokenizer, fake_spec
from packlight.models.grammar import open_grammars
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from packlight.telemetry.traces import NoTraces, Traces

PAGE = 4


@dataclass
class Gate:
    """Holds the compute thread before its steps until the test lets them pass; `open` lets all pass. `steps` gains the
    gate's name with each step; gates may share it."""

    name: str = ""
    steps: list[str] = field(default_factory=list)
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_open: bool = True
    num_steps: int = 0
    error: Exception | None = None

    def __call__(self) -> None:
        if not self.is_open:
            self.permits.acquire(timeout=30)
        self.num_steps += 1
        self.steps.append(self.name)
        if self.error is not None:
            raise self.error

    def let_all(self) -> None:
        self.is_open = True
        for _ in range(1000):
            self.permits.release()


@dataclass
class FakePair:
    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_gate: Gate
    decode_gate: Gate

    def check_idle(self) -> None:
        """Nothing is held, nothing is lost."""
        self.prefill.check()
        self.decode.check()
        assert self.prefill.num_unfinished == 0
        assert self.decode.num_unfinished == 0
        assert self.prefill.blocks.book.num_held == 0
        assert self.decode._memory.book.num_free == self.decode._memory.book.num_pages


def fake_runner(bias: int, num_blocks: int, gate: Callable[[], None]) -> Runner:
    spec = fake_spec()
    pool = KVPool(spec, num_blocks=num_blocks, page_size=PAGE, dtype=torch.float32)
    return Runner(FakeModel(spec, bias=bias, before_step=gate), pool, ReferenceAttention())


@contextlib.asynccontextmanager
async def running(*coroutines) -> AsyncIterator[None]:
    """Runs worker loops beside the test; a loop that dies fails it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if not isinstance(result, asyncio.CancelledError):
                raise result


@contextlib.asynccontextmanager
async def fake_pair(
    *,
    prefill: PrefillConfig | None = None,
    decode: DecodeConfig | None = None,
    prefill_blocks: int = 64,
    decode_blocks: int = 64,
    client: Callable[[PrefillWorker], PrefillClient] | None = None,
    shared: Compute | None = None,
    prefill_clock: Callable[[], float] = time.monotonic,
    traces: Traces | None = None,
) -> AsyncIterator[FakePair]:
    """Both workers, running. `client` puts something between decode and prefill; `shared` has them share a thread."""
    steps: list[str] = []
    grammars = open_grammars(FakeTokenizer(), fake_spec())
    gates = Gate("prefill", steps), Gate("decode", steps)
    computes = (shared, shared) if shared else (Compute("prefill"), Compute("decode"))
    prefill_worker = PrefillWorker(
        prefill or PrefillConfig(),
        fake_runner(PREFILL_BIAS, prefill_blocks, gates[0]),
        computes[0],
        metrics=PrefillMetrics(CollectorRegistry()),
        grammars=grammars,
        tracer=(traces or NoTraces()).tracer("prefill", "prefill-0"),
        clock=prefill_clock,
    )
    reached = client(prefill_worker) if client else prefill_worker
    decode_worker = DecodeWorker(
        decode or DecodeConfig(),
        fake_runner(DECODE_BIAS, decode_blocks, gates[1]),
        computes[1],
        lambda worker_id, address: reached,
        metrics=DecodeMetrics(CollectorRegistry()),
        grammars=grammars,
        tracer=(traces or NoTraces()).tracer("decode", "decode-0"),
    )
    pair = FakePair(prefill_worker, decode_worker, *gates)
    try:
        async with running(prefill_worker.run(), decode_worker.run()):
            yield pair
            for gate in gates:
                gate.let_all()
            await until(lambda: pair.prefill.num_unfinished == 0 and pair.decode.num_unfinished == 0)
        pair.check_idle()
    finally:
        for gate in gates:
            gate.let_all()
        for compute in computes:
            compute.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that happens on another thread or task."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the conditions are many and belong to others
            await asyncio.sleep(0.001)


def make_request(
    prompt: list[int],
    max_tokens: int = 8,
    *,
    request_id: str = "r",
    pack: PackSpec | None = None,
    resumed: list[int] | None = None,
    **kwargs,
) -> GenerateRequest:
    kwargs.setdefault("deadline_s", 30.0)
    return GenerateRequest(
        request_id=request_id,
        token_ids=(*prompt, *(resumed or [])),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(temperature=0.0),
        stop=StopRules(max_tokens=max_tokens),
        pack=pack or PackSpec(),
        prefill_id="prefill-0",
        **kwargs,
    )


async def collect(worker, request):
    """(token ids, terminal event)."""
    tokens: list[int] = []
    async for event in worker.generate(request):
        if isinstance(event, Tokens):
            tokens.extend(token.token_id for token in event.tokens)
        elif is_terminal(event):
            return tokens, event
    raise AssertionError("no terminal event")


async def answer(worker, request) -> list[int]:
    tokens, event = await collect(worker, request)
    assert isinstance(event, Finished), event
    return tokens
