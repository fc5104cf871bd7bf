"""One suite for every way to reach a prefill worker: the worker itself, and a gRPC client of a real server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
from prometheus_client import CollectorRegistry

from packlight.attention.reference import ReferenceAttention
from packlight.core.config import PrefillConfig
from packlight.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    PacklightError,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    ShipmentIncompatible,
    WorkerLost,
)
from packlight.core.shipping import (
    Accepted,
    Chunk,
    FirstToken,
    LayerHeader,
    PrefillClient,
    PrefillEvent,
    Shipped,
    Waiting,
)
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams, Token
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.models.fake import PREFILL_BIAS, FakeModel, fake_answer
from packlight.models.fake_spec import fake_spec
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from packlight.wire.prefill import GrpcPrefillClient, prefill_handler
from tests.support.certificates import fleet_credentials
from tests.support.cluster import Later, loopback
from tests.support.fake_pair import answer, collect, fake_pair, make_request, running, until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
LONG = list(range(1, 41))
MIB = 1 << 20


@asynccontextmanager
async def directly(worker: PrefillClient) -> AsyncIterator[PrefillClient]:
    yield worker


@asynccontextmanager
async def over_grpc(worker: PrefillClient) -> AsyncIterator[PrefillClient]:
    async with loopback(prefill_handler(worker)) as (_, channel):
        yield GrpcPrefillClient(channel, "prefill-0")


@asynccontextmanager
async def over_tls(worker: PrefillClient) -> AsyncIterator[PrefillClient]:
    with fleet_credentials() as tls:
        async with loopback(prefill_handler(worker), tls) as (_, channel):
            yield GrpcPrefillClient(channel, "prefill-0")


@pytest.fixture(params=[directly, over_grpc, over_tls])
def reach(request):
    return request.param


def request_for(prompt: list[int], **fields) -> PrefillRequest:
    fields = {"request_id": "r", "pack": PackSpec(), "deadline_s": 30.0, "transports": ("inproc", "grpc"), **fields}
    return PrefillRequest(
        token_ids=tuple(prompt), num_prompt_tokens=len(prompt), sampling=SamplingParams(temperature=0.0), **fields
    )


async def events_of(client: PrefillClient, request: PrefillRequest) -> list[PrefillEvent]:
    async with aclosing(client.prefill(request)) as events:
        return [event async for event in events]


def payload_of(events: list[PrefillEvent]) -> bytes:
    return b"".join(bytes(event.data) for event in events if isinstance(event, Chunk))


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_whole_shipment_in_order(reach):
    async with fake_pair() as pair, reach(pair.prefill) as client:
        events = await events_of(client, request_for(PROMPT))
    kinds = [type(event) for event in events]
    assert kinds.count(FirstToken) == 1
    kinds.remove(FirstToken)
    assert kinds == [Accepted, LayerHeader, Chunk, Shipped]
    accepted, shipped = next(e for e in events if isinstance(e, Accepted)), events[-1]
    assert accepted.compatibility == pair.decode.compatibility
    assert len(payload_of(events)) == shipped.shipped_bytes == 3 * 4 * 2 * 2 * 4
    assert FirstToken(Token(fake_answer(PROMPT, 1)[0]), 0) in events


async def test_where_the_kept_tokens_lie_is_told_to_who_asks(reach):
    pack = PackSpec("streaming_llm", budget_tokens=10, window=4, sinks=2)
    async with fake_pair() as pair, reach(pair.prefill) as client:
        asked = await events_of(client, request_for(LONG, pack=pack, explain=True))
        not_asked = await events_of(client, request_for(LONG, pack=pack))
    kept = asked[-1].kept_map
    assert (kept.num_tokens, kept.bin_tokens, kept.num_kept_tokens) == (40, 1, (10.0,))
    assert list(kept.shares) == [255] * 2 + [0] * 30 + [255] * 8
    assert not_asked[-1].kept_map is None


async def test_every_way_ships_the_same_bytes():
    pack = PackSpec("streaming_llm", budget_tokens=10, window=4, sinks=2)
    shipped = []
    for reach in (directly, over_grpc):
        async with fake_pair() as pair, reach(pair.prefill) as client:
            events = await events_of(client, request_for(LONG, pack=pack))
            headers = [e for e in events if isinstance(e, LayerHeader)]
            first = [e for e in events if isinstance(e, FirstToken)]  # at any place: it overtakes what waits
            shipped.append((payload_of(events), headers, first))
    assert shipped[0] == shipped[1]


async def test_a_decode_worker_cannot_tell_the_difference(reach):
    later = Later()
    async with fake_pair(client=lambda _: later) as pair, reach(pair.prefill) as later.target:
        assert await answer(pair.decode, make_request(LONG, 9)) == fake_answer(LONG, 9)


async def test_many_at_once(reach):
    prompts = [[i + 1] * (i + 3) for i in range(24)]
    async with fake_pair(prefill_blocks=512) as pair, reach(pair.prefill) as client:
        answers = await asyncio.gather(*(events_of(client, request_for(p, request_id=str(p[0]))) for p in prompts))
    for prompt, events in zip(prompts, answers, strict=True):
        assert FirstToken(Token((sum(prompt) + PREFILL_BIAS) % 256), 0) in events
        assert isinstance(events[-1], Shipped)


@asynccontextmanager
async def bulky_worker(page_size: int = 400_000) -> AsyncIterator[PrefillWorker]:
    """16 bytes per token, shipped in whole pages: little has to be computed to ship a lot."""
    pool = KVPool(fake_spec(), num_blocks=3, page_size=page_size, dtype=torch.float32)
    runner = Runner(FakeModel(fake_spec(), bias=PREFILL_BIAS), pool, ReferenceAttention())
    compute = Compute()
    worker = PrefillWorker(PrefillConfig(), runner, compute, metrics=PrefillMetrics(CollectorRegistry()))
    try:
        async with running(worker.run()):
            yield worker
            await until(lambda: worker.num_unfinished == 0)
        worker.check()
    finally:
        compute.close()


async def test_a_shipment_larger_than_grpcs_message_limit(reach):
    async with bulky_worker() as worker, reach(worker) as client:
        events = await events_of(client, request_for(PROMPT))
    assert events[-1].shipped_bytes == len(payload_of(events)) == 400_000 * 2 * 2 * 4 > 4 * MIB


async def test_a_single_event_larger_than_grpcs_message_limit(reach):
    async with reach(Scripted([Chunk(bytes(range(256)) * (5 * MIB // 256))])) as client:
        (chunk,) = await events_of(client, request_for(PROMPT))
    assert chunk.data == bytes(range(256)) * (5 * MIB // 256)


async def test_a_prompt_larger_than_grpcs_message_limit(reach):
    async with fake_pair() as pair, reach(pair.prefill) as client:
        with pytest.raises(RequestNeverFits, match="needs 275000 KV blocks, the prefill pool has 64"):
            await events_of(client, request_for([7] * 1_100_000))


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """Says what it is told to, then ends or raises."""

    def __init__(self, events: list[PrefillEvent], error: Exception | None = None) -> None:
        self._events, self._error = events, error

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        for event in self._events:
            yield event
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("num_events", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        QueueFull("full, naïve ✓ 中文\nsecond line", retry_after_s=2.5, worker_id="prefill-7"),
        InvalidRequest("wrong", param="messages[2].content", code="my_code"),
        ShipmentCorrupt("a checksum is wrong"),
        Draining("", retry_after_s=0.0),
        InternalError("x" * 100_000),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_arrive_whole(reach, error, num_events):
    async with reach(Scripted([FirstToken(Token(1), 0)] * num_events, error)) as client:
        received, arrived = await received_and_raised(client)
    assert type(arrived) is type(error)
    assert arrived.message[:1000] == error.message[:1000]
    assert (arrived.param, arrived.code, arrived.retry_after_s, arrived.worker_id) == (
        error.param,
        error.code,
        error.retry_after_s,
        error.worker_id,
    )
    assert len(received) == num_events


async def received_and_raised(client: PrefillClient) -> tuple[list[PrefillEvent], PacklightError]:
    received: list[PrefillEvent] = []
    try:
        async with aclosing(client.prefill(request_for(PROMPT))) as events:
            async for event in events:
                received.append(event)
    except PacklightError as error:
        return received, error
    raise AssertionError("nothing was raised")


async def test_an_exception_of_the_worker_is_an_internal_error():
    async with over_grpc(Scripted([], KeyError("boom"))) as client:
        with pytest.raises(InternalError, match="boom"):
            await events_of(client, request_for(PROMPT))


async def test_what_prompts_have_in_common_is_computed_once_though_they_come_at_once(reach):
    config = PrefillConfig(chunk_tokens=16)
    async with fake_pair(prefill=config) as pair, reach(pair.prefill) as client:
        pair.prefill_gate.is_open = False
        prompts = [[*LONG, 50 + number, 60] for number in range(4)]
        asked = [
            asyncio.create_task(events_of(client, request_for(prompt, request_id=str(number))))
            for number, prompt in enumerate(prompts)
        ]
        await until(lambda: pair.prefill.num_unfinished == 4)
        pair.prefill_gate.let_all()
        firsts = [next(e for e in events if isinstance(e, FirstToken)) for events in await asyncio.gather(*asked)]
        assert sorted(first.num_cached_tokens for first in firsts) == [0, 40, 40, 40]  # who came first is chance
        assert [first.token.token_id for first in firsts] == [fake_answer(prompt, 1)[0] for prompt in prompts]


async def test_whoever_waited_for_a_prompt_that_was_cancelled_computes_the_rest(reach):
    config = PrefillConfig(chunk_tokens=16)
    async with fake_pair(prefill=config) as pair, reach(pair.prefill) as client:
        pair.prefill_gate.is_open = False
        first = asyncio.create_task(events_of(client, request_for([*LONG, 50], request_id="1")))
        await until(lambda: pair.prefill.load().num_running == 1)
        second = asyncio.create_task(events_of(client, request_for([*LONG, 51], request_id="2")))
        await until(lambda: pair.prefill.load().num_queued == 1)
        pair.prefill_gate.permits.release()
        await until(lambda: pair.prefill._roster.admitted[0].num_done == 16)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: pair.prefill._roster.admitted[0].cancelled)
        pair.prefill_gate.let_all()
        begun = next(e for e in await second if isinstance(e, FirstToken))
        assert begun.num_cached_tokens == 32  # two steps: one was running when the other left
        assert begun.token.token_id == fake_answer([*LONG, 51], 1)[0]


async def test_a_queue_is_not_a_silence(reach):
    """Each look at the clock finds it three seconds later."""
    ticks = itertools.count(step=3.0)
    config = PrefillConfig(chunk_tokens=4)
    async with fake_pair(prefill=config, prefill_clock=lambda: next(ticks)) as pair, reach(pair.prefill) as client:
        both = await asyncio.gather(
            events_of(client, request_for(LONG)), events_of(client, request_for(LONG[::-1], request_id="behind"))
        )
    num_before = [next(at for at, event in enumerate(events) if isinstance(event, Accepted)) for events in both]
    for events, at in zip(both, num_before, strict=True):
        assert set(map(type, events[:at])) == {Waiting}
        assert not any(isinstance(event, Waiting) for event in events[at:])
    first, behind = sorted(num_before)  # who came first is chance
    assert first >= 5
    assert behind >= 15


async def test_refusals(reach):
    config = PrefillConfig(max_queue=1, max_prompts=1)
    async with fake_pair(prefill=config, prefill_blocks=3) as pair, reach(pair.prefill) as client:
        with pytest.raises(ShipmentIncompatible):
            await events_of(client, request_for(PROMPT, transports=("carrier-pigeon",)))
        pair.prefill_gate.is_open = False
        running_now = asyncio.create_task(events_of(client, request_for(PROMPT)))
        await until(lambda: pair.prefill.load().num_running == 1)
        waiting = asyncio.create_task(events_of(client, request_for(PROMPT, request_id="waits")))
        await until(lambda: pair.prefill.load().num_queued == 1)
        with pytest.raises(QueueFull) as full:
            await events_of(client, request_for(PROMPT, request_id="too many"))
        assert full.value.retry_after_s == 1.0
        pair.prefill.drain()
        with pytest.raises(Draining):
            await events_of(client, request_for(PROMPT, request_id="late"))
        pair.prefill_gate.let_all()
        for events in await asyncio.gather(running_now, waiting):
            assert isinstance(events[-1], Shipped)


async def test_a_step_that_raises_fails_its_request_only(reach):
    async with fake_pair() as pair, reach(pair.prefill) as client:
        pair.prefill_gate.error = ValueError("boom")
        with pytest.raises(InternalError, match="boom"):
            await events_of(client, request_for(PROMPT))
        pair.prefill_gate.error = None
        assert isinstance((await events_of(client, request_for(PROMPT)))[-1], Shipped)


async def test_a_deadline_ends_the_call_on_both_ends():
    async with fake_pair() as pair, over_grpc(pair.prefill) as client:
        pair.prefill_gate.is_open = False
        with pytest.raises(DeadlineExceeded) as late:
            await events_of(client, request_for(PROMPT, deadline_s=0.1))
        assert late.value.worker_id == "prefill-0"
        pair.prefill_gate.let_all()
        await until(lambda: pair.prefill.num_unfinished == 0)


# ── ends: whoever stops reading frees the other end ──────────────────────────────────────────────────────────────────


async def test_closing_while_it_computes_frees_within_one_step(reach):
    async with (
        fake_pair(prefill=PrefillConfig(chunk_tokens=4)) as pair,
        reach(pair.prefill) as client,
    ):
        pair.prefill_gate.is_open = False
        reading = asyncio.create_task(events_of(client, request_for(LONG)))
        for _ in range(2):
            pair.prefill_gate.permits.release()
        await until(lambda: pair.prefill_gate.num_steps == 2 and pair.prefill._roster.admitted[0].num_done == 8)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: pair.prefill._roster.admitted[0].cancelled)
        pair.prefill_gate.let_all()
        await until(lambda: pair.prefill.num_unfinished == 0)
        assert pair.prefill_gate.num_steps == 3  # the one that was running
        pair.check_idle()


async def test_closing_while_it_waits_takes_it_off_the_queue(reach):
    config = PrefillConfig(max_prompts=1)
    async with fake_pair(prefill=config, prefill_blocks=3) as pair, reach(pair.prefill) as client:
        pair.prefill_gate.is_open = False
        first = asyncio.create_task(events_of(client, request_for(PROMPT)))
        await until(lambda: pair.prefill.load().num_running == 1)
        second = asyncio.create_task(events_of(client, request_for(LONG[:11], request_id="2")))
        await until(lambda: pair.prefill.load().num_queued == 1)
        second.cancel()
        await until(lambda: pair.prefill.load().num_queued == 0)
        pair.prefill_gate.let_all()
        assert isinstance((await first)[-1], Shipped)


@pytest.mark.parametrize("num_read", [1, 2, 3])
async def test_closing_in_the_middle_of_a_shipment(reach, num_read):
    async with bulky_worker() as worker, reach(worker) as client:
        async with aclosing(client.prefill(request_for(PROMPT))) as events:
            for _ in range(num_read):
                await anext(events)
        await until(lambda: worker.num_unfinished == 0)


async def test_a_slow_reader_holds_up_nobody_and_loses_nothing(reach):
    async with bulky_worker() as worker, reach(worker) as client:
        async with aclosing(client.prefill(request_for(PROMPT))) as slow:
            received = [await anext(slow)]
            await until(lambda: worker.load().num_running == 1 and not worker._roster.admitted)
            assert worker.num_unfinished == 1  # computed, and waiting to be read
            for number in range(2):
                others = await events_of(client, request_for(LONG, request_id=str(number)))
                assert isinstance(others[-1], Shipped)
            received += [event async for event in slow]
        assert len(payload_of(received)) == received[-1].shipped_bytes


async def test_a_slow_reader_who_leaves_frees_the_worker(reach):
    """Over gRPC the server is waiting for room to write when the reader goes."""
    async with bulky_worker(page_size=2_000_000) as worker, reach(worker) as client:
        async with aclosing(client.prefill(request_for(PROMPT))) as slow:
            await anext(slow)
            await until(lambda: worker.num_unfinished == 1 and not worker._roster.admitted)
            await asyncio.sleep(0.05)  # until flow control has stopped the server
            assert worker.num_unfinished == 1
        await until(lambda: worker.num_unfinished == 0)


# ── the other end goes away (gRPC only) ──────────────────────────────────────────────────────────────────────────────


async def test_nobody_there_is_a_lost_worker_at_once():
    async with loopback(prefill_handler(Scripted([]))) as (server, channel):
        await server.stop()
        with pytest.raises(WorkerLost) as lost:
            await events_of(GrpcPrefillClient(channel, "prefill-0"), request_for(PROMPT))
        assert lost.value.worker_id == "prefill-0"


async def test_a_server_that_stops_loses_its_calls_and_serves_again_when_it_is_back():
    async with fake_pair() as pair, loopback(prefill_handler(pair.prefill)) as (server, channel):
        client = GrpcPrefillClient(channel, "prefill-0")
        pair.prefill_gate.is_open = False
        calls = [asyncio.create_task(events_of(client, request_for([i] * 9, request_id=str(i)))) for i in range(3)]
        await until(lambda: pair.prefill.num_unfinished == 3)
        await server.stop()
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, WorkerLost)
        pair.prefill_gate.let_all()
        await until(lambda: pair.prefill.num_unfinished == 0)
        await server.start_again()
        assert isinstance((await events_of(client, request_for(PROMPT)))[-1], Shipped)


async def test_a_lost_prefill_worker_fails_the_answer_and_frees_decodes_pages():
    later = Later()
    async with fake_pair(client=lambda _: later) as pair, loopback(prefill_handler(pair.prefill)) as (server, channel):
        later.target = GrpcPrefillClient(channel, "prefill-0")
        pair.prefill_gate.is_open = False
        waiting = asyncio.create_task(collect(pair.decode, make_request(PROMPT)))
        await until(lambda: pair.prefill.num_unfinished == 1)
        await server.stop()
        tokens, event = await waiting
        assert tokens == []
        assert isinstance(event.error, WorkerLost)
        assert event.error.worker_id == "prefill-0"
        assert pair.decode.load().num_free_pages == pair.decode.load().num_total_pages
