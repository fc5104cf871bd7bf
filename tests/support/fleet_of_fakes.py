"""A fleet in one process: prefill and decode workers around the arithmetic model, index, registry, and a pipeline.

The workers, the publishers, the index, the registry and the view are the real ones. Heartbeats and polls happen when
the test says so, and what leads from one part to another can be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from packlight.colocated import PrefillBeside
from packlight.core.config import Config, DecodeConfig, KVConfig, LocalPrefillConfig, PrefillConfig, RouterConfig
from packlight.core.errors import WorkerLost
from packlight.core.hashing import page_hashes
from packlight.core.shipping import PrefillEvent
from packlight.core.types import GenerateEvent, GenerateRequest, PrefillRequest, Tokens, is_terminal
from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.engine import LocalEngine
from packlight.engine.host import Identity, describe
from packlight.fleet.memory import MemoryFleet
from packlight.fleet.view import FleetView
from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS, FakeModel
from packlight.models.fake_spec import FAKE_VOCABULARY, fake_spec
from packlight.prefill.publisher import Publisher
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.memory import MemoryPrefixIndex
from packlight.router.pipeline import Pipeline
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from packlight.telemetry.traces import NoTraces, Tracer, Traces
from tests.support.clock import FakeClock
from tests.support.fake_pair import PAGE, Gate, fake_runner, running, until

Event = PrefillEvent | GenerateEvent
Tamper = Callable[[Any], list[Any]]


@dataclass
class Link:
    """The way to one worker. It can be cut, and what passes can be changed; an exception in it is raised."""

    worker: PrefillWorker | DecodeWorker
    worker_id: WorkerId
    tamper: Tamper = lambda event: [event]
    seen: list[PrefillRequest | GenerateRequest] = field(default_factory=list)
    num_tokens_until_cut: int | None = None

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        assert isinstance(self.worker, PrefillWorker)
        async with aclosing(self._pass(request, self.worker.prefill(request))) as events:
            async for event in events:
                yield event

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        assert isinstance(self.worker, DecodeWorker)
        async with aclosing(self._pass(request, self.worker.generate(request))) as events:
            async for event in events:
                yield event

    async def _pass(self, request: Any, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        self.seen.append(request)
        self._check_cut()
        async with aclosing(source) as events:
            async for event in events:
                for passed in self.tamper(event):
                    if isinstance(passed, Exception):
                        raise passed
                    yield passed
                if isinstance(event, Tokens) and self.num_tokens_until_cut is not None:
                    self.num_tokens_until_cut -= len(event.tokens)
                self._check_cut()

    def _check_cut(self) -> None:
        if self.num_tokens_until_cut is not None and self.num_tokens_until_cut <= 0:
            raise WorkerLost(f"worker {self.worker_id} is gone", worker_id=self.worker_id)


@dataclass
class Member:
    worker: PrefillWorker | DecodeWorker
    link: Link
    gate: Gate
    compute: Compute
    identity: Identity
    publisher: Publisher | None = None
    beside: PrefillBeside | None = None
    local: Link | None = None

    @property
    def worker_id(self) -> WorkerId:
        return self.identity.worker_id

    def info(self) -> WorkerInfo:
        offer = self.beside.offer() if self.beside else None
        return describe(self.identity, self.worker, fake_spec(), PAGE, local_prefill=offer)

    @property
    def workers(self) -> list[PrefillWorker | DecodeWorker]:
        return [self.worker, self.beside.worker] if self.beside else [self.worker]

    async def beat(self) -> None:
        for part in (self.publisher, self.beside):
            if part is not None:
                await part.beat()

    async def run(self) -> None:
        parts = [part.run() for part in (self.worker, self.publisher, self.beside) if part is not None]
        await asyncio.gather(*parts)


class FleetOfFakes:
    """`fleet["prefill-0"]` is a member; `pipeline` is the router's."""

    def __init__(
        self, members: list[Member], index: PrefixIndex, config: RouterConfig, seed: int, tracer: Tracer
    ) -> None:
        self.members = {member.worker_id: member for member in members}
        self.index, self.clock, self.registry = index, FakeClock(), CollectorRegistry()
        self.board = MemoryFleet(5.0, self.clock)
        self.view = FleetView(self.board, poll_s=1.0, suspect_s=5.0, clock=self.clock)
        self.pipeline = Pipeline(
            config,
            fake_spec(),
            index,
            self.view,
            self,
            RouterMetrics(self.registry),
            random=Random(seed),
            tracer=tracer,
        )

    def __getitem__(self, worker_id: WorkerId) -> Member:
        return self.members[worker_id]

    def get(self, worker: WorkerInfo) -> Link:
        """The pipeline's `DecodeClients`."""
        return self.members[worker.worker_id].link

    async def beat(self) -> None:
        """A heartbeat of everybody whose link is not cut, and a look at the board by the router."""
        for member in self.members.values():
            if member.link.num_tokens_until_cut != 0:
                await self.board.heartbeat(member.info())
                await member.beat()
        await self.view.refresh()

    async def until_indexed(self, prompt: list[int], worker_id: WorkerId) -> None:
        """The publisher has told the index of all full pages of `prompt`."""
        hashes = page_hashes(prompt, PAGE, fingerprint=fake_spec().fingerprint)
        matched: dict[WorkerId, int] = {}
        while matched.get(worker_id) != len(hashes):
            await until(lambda: True)
            matched = await self.index.match(fake_spec().fingerprint, hashes)

    def load_of(self, role: Role) -> list[int]:
        """How many requests each worker of the role has seen."""
        return [len(member.link.seen) for member in self.members.values() if member.identity.role is role]

    def retries(self, kind: str) -> float:
        return self.registry.get_sample_value("packlight_router_retries_total", {"type": kind}) or 0.0

    def is_idle(self) -> bool:
        return all(worker.num_unfinished == 0 for member in self.members.values() for worker in member.workers)

    def check_idle(self) -> None:
        for member in self.members.values():
            for worker in member.workers:
                worker.check()
            if isinstance(member.worker, DecodeWorker):
                assert member.worker.load().num_free_pages == member.worker.load().num_total_pages
        assert not any(self.pipeline._sent.tokens.values()), "tokens that nobody prefills"
        assert not any(self.pipeline._sent.requests.values()), "requests that nobody decodes"


@contextlib.asynccontextmanager
async def fleet_of_fakes(
    *,
    num_prefill: int = 2,
    num_decode: int = 2,
    router: RouterConfig | None = None,
    prefill: PrefillConfig | None = None,
    decode: DecodeConfig | None = None,
    index: PrefixIndex | None = None,
    local_tokens: int = 0,
    seed: int = 0,
    traces: Traces | None = None,
) -> AsyncIterator[FleetOfFakes]:
    """All on the board and seen by the router. Afterwards nothing may be held anywhere. Decode workers prefill prompts
    of up to `local_tokens` themselves."""
    index = index or MemoryPrefixIndex(1000)
    traces = traces or NoTraces()
    members = [_prefill_member(number, prefill or PrefillConfig(), index, traces) for number in range(num_prefill)]
    prefills = {member.worker_id: member.link for member in members}
    members += [
        _decode_member(number, decode or DecodeConfig(), prefills, index, local_tokens, traces)
        for number in range(num_decode)
    ]
    fleet = FleetOfFakes(members, index, router or RouterConfig(), seed, traces.tracer("router", "router"))
    try:
        async with running(*(member.run() for member in members)):
            await fleet.beat()
            yield fleet
            for member in members:
                member.gate.let_all()
            await until(fleet.is_idle)
        fleet.check_idle()
    finally:
        for member in members:
            member.gate.let_all()
            member.compute.close()


def _prefill_member(number: int, config: PrefillConfig, index: PrefixIndex, traces: Traces) -> Member:
    worker_id, gate, compute = f"prefill-{number}", Gate(), Compute(f"prefill-{number}")
    runner = fake_runner(PREFILL_BIAS, 64, gate)
    metrics, tracer = PrefillMetrics(CollectorRegistry()), traces.tracer("prefill", worker_id)
    worker = PrefillWorker(config, runner, compute, metrics=metrics, tracer=tracer)
    holder = Holder(worker_id, 1)
    publisher = Publisher(index, fake_spec().fingerprint, holder, worker.blocks.cache.prefixes)
    worker.blocks.inventory = publisher
    identity = Identity(worker_id, 1, Role.PREFILL, f"{worker_id}:1")
    return Member(worker, Link(worker, worker_id), gate, compute, identity, publisher)


def _decode_member(
    number: int,
    config: DecodeConfig,
    prefills: dict[WorkerId, Link],
    index: PrefixIndex,
    local_tokens: int,
    traces: Traces,
) -> Member:
    worker_id, gate = f"decode-{number}", Gate()
    compute = Compute(worker_id, max_stall_s=config.max_stall_s)
    beside = _beside(worker_id, config, gate, compute, index, local_tokens, traces) if local_tokens else None
    local = Link(beside.worker, beside.worker_id) if beside else None
    reachable = prefills | ({local.worker_id: local} if local else {})
    worker = DecodeWorker(
        config,
        fake_runner(DECODE_BIAS, 256, gate),
        compute,
        lambda prefill_id, address: reachable[prefill_id],
        metrics=DecodeMetrics(CollectorRegistry()),
        tracer=traces.tracer("decode", worker_id),
    )
    identity = Identity(worker_id, 1, Role.DECODE, f"{worker_id}:1")
    return Member(worker, Link(worker, worker_id), gate, compute, identity, beside=beside, local=local)


def _beside(
    worker_id: WorkerId,
    config: DecodeConfig,
    gate: Gate,
    compute: Compute,
    index: PrefixIndex,
    num_tokens: int,
    traces: Traces,
) -> PrefillBeside:
    spec = fake_spec()
    offered = LocalPrefillConfig(kv_memory_bytes=num_tokens * spec.kv_bytes_per_token(4))
    whole = Config(
        kv=KVConfig(page_size=PAGE),
        decode=config.model_copy(update={"local_prefill": offered, "attention": "reference"}),
    )
    engine = LocalEngine(FakeModel(spec, bias=PREFILL_BIAS, before_step=gate), whole)
    return PrefillBeside(whole, (worker_id, 1), engine, compute, index, PrefillMetrics(CollectorRegistry()), traces)


def broken_answer(prompt: list[int], num_tokens: int, breaks: list[int]) -> list[int]:
    """`fake_answer` with the decode worker lost after each of `breaks` tokens: the next one is prefill's again."""
    answer: list[int] = []
    while len(answer) < num_tokens:
        bias = PREFILL_BIAS if len(answer) in (0, *breaks) else DECODE_BIAS
        answer.append((sum(prompt) + sum(answer) + bias) % FAKE_VOCABULARY)
    return answer


async def events_of(source: AsyncGenerator[GenerateEvent, None]) -> tuple[list[int], GenerateEvent]:
    """(token ids, terminal event). Whatever else happens, there is exactly one terminal event, and it is the last."""
    async with aclosing(source) as events:
        received = [event async for event in events]
    assert [is_terminal(event) for event in received] == [False] * (len(received) - 1) + [True]
    return [token.token_id for event in received if isinstance(event, Tokens) for token in event.tokens], received[-1]
