"""One suite for every way to reach a decode worker: the worker itself, and a gRPC client of a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from packlight.core.config import DecodeConfig
from packlight.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    PacklightError,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    WorkerLost,
)
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    PackSpec,
    Progress,
    SamplingParams,
    StopRules,
    Tokens,
)
from packlight.core.workers import Role, WorkerInfo
from packlight.decode.worker import DecodeWorker
from packlight.models.fake import fake_answer
from packlight.router.clients import DecodeClient, GrpcDecodeClients
from packlight.wire.decode import SERVICE, GrpcDecodeClient, decode_handler
from packlight.wire.events import event_from_proto
from packlight.wire.requests import generate_to_proto
from packlight.wire.v1 import decode_pb2
from tests.support.certificates import fleet_credentials
from tests.support.cluster import loopback
from tests.support.fake_pair import answer, collect, fake_pair, make_request, until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
DECODE_ID = "decode-0"


@asynccontextmanager
async def directly(worker: DecodeWorker) -> AsyncIterator[DecodeClient]:
    yield worker


@asynccontextmanager
async def over_grpc(worker: DecodeWorker) -> AsyncIterator[DecodeClient]:
    async with loopback(decode_handler(worker)) as (_, channel):
        client = GrpcDecodeClient(channel, DECODE_ID)
        yield client
        await client.close()


@asynccontextmanager
async def over_tls(worker: DecodeWorker) -> AsyncIterator[DecodeClient]:
    with fleet_credentials() as tls:
        async with loopback(decode_handler(worker), tls) as (_, channel):
            client = GrpcDecodeClient(channel, DECODE_ID)
            yield client
            await client.close()


@pytest.fixture(params=[directly, over_grpc, over_tls])
def reach(request):
    return request.param


def has_free_pages(worker: DecodeWorker) -> bool:
    return worker.load().num_free_pages == worker.load().num_total_pages


async def begin(
    client: DecodeClient, request: GenerateRequest, num_tokens: int = 1
) -> AsyncGenerator[GenerateEvent, None]:
    """An answer that is under way: `num_tokens` have been read."""
    events = client.generate(request)
    while num_tokens:
        num_tokens -= isinstance(await anext(events), Tokens)
    return events


async def rest_of(events: AsyncGenerator[GenerateEvent, None]) -> tuple[list[int], GenerateEvent]:
    """The tokens that are still to come, and the terminal event."""
    rest = [event async for event in events]
    return [token.token_id for event in rest if isinstance(event, Tokens) for token in event.tokens], rest[-1]


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_one_by_one_then_the_end(reach):
    async with (
        fake_pair() as pair,
        reach(pair.decode) as client,
        aclosing(client.generate(make_request(PROMPT))) as all_,
    ):
        events = [event async for event in all_]
    *tokens, end = [event for event in events if not isinstance(event, Progress)]
    assert [event.tokens[0].token_id for event in tokens] == fake_answer(PROMPT, 8)
    assert all(isinstance(event, Tokens) and event.request_id == "r" for event in tokens)
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.LENGTH
    usage = end.usage
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens) == (11, 0, 8)
    assert usage.kv.shipped_bytes == 3 * 4 * 2 * 2 * 4
    assert usage.timings.prefill_s > 0


async def test_log_probabilities_and_stop_rules_cross(reach):
    request = replace(
        make_request(PROMPT),
        sampling=SamplingParams(temperature=0.0, num_logprobs=2),
        stop=StopRules(8, stop_token_ids=(fake_answer(PROMPT, 3)[2],)),
    )
    async with fake_pair() as pair, reach(pair.decode) as client, aclosing(client.generate(request)) as all_:
        events = [event async for event in all_ if not isinstance(event, Progress)]
    assert events[-1].reason is FinishReason.STOP
    assert len(events) == 4
    for event in events[:3]:
        (token,) = event.tokens
        assert token.logprob == pytest.approx(token.top_logprobs[0][1])
        assert token.token_id == token.top_logprobs[0][0]
        assert len(token.top_logprobs) == 2


async def test_where_the_kept_tokens_lie_is_told_to_who_asks(reach):
    pack = PackSpec("streaming_llm", budget_tokens=8, window=4, sinks=2)
    async with fake_pair() as pair, reach(pair.decode) as client:
        _, asked = await collect(client, make_request(PROMPT, pack=pack, explain=True))
        _, not_asked = await collect(client, make_request(PROMPT, pack=pack, request_id="other"))
    assert list(asked.usage.kv.kept_map.shares) == [255] * 2 + [0] * 3 + [255] * 6
    assert not_asked.usage.kv.kept_map is None


async def test_many_at_once(reach):
    prompts = [[i + 1] * (i + 3) for i in range(40)]
    async with (
        fake_pair(prefill_blocks=512, decode_blocks=512, decode=DecodeConfig(max_batch=7)) as pair,
        reach(pair.decode) as client,
    ):
        answers = await asyncio.gather(
            *(answer(client, make_request(p, 3 + p[0] % 9, request_id=str(p[0]))) for p in prompts)
        )
    assert answers == [fake_answer(p, 3 + p[0] % 9) for p in prompts]


async def test_a_reader_that_pauses_misses_nothing_and_holds_up_nobody(reach):
    async with fake_pair(decode_blocks=256) as pair, reach(pair.decode) as client:
        slow = await begin(client, make_request(PROMPT, 300, request_id="slow"))
        assert await answer(client, make_request(PROMPT, request_id="quick")) == fake_answer(PROMPT, 8)
        await until(lambda: pair.decode.num_unfinished == 0)
        tokens, end = await rest_of(slow)
    assert tokens == fake_answer(PROMPT, 300)[1:]
    assert isinstance(end, Finished)


async def test_requests_larger_than_grpcs_message_limit(reach):
    async with fake_pair() as pair, reach(pair.decode) as client:
        error = await failure(client, make_request([7] * 1_100_000, 8))
        assert isinstance(error, RequestNeverFits)
        assert "275002" in error.message
        # The stream they share is unharmed.
        assert await answer(client, make_request(PROMPT, request_id="next")) == fake_answer(PROMPT, 8)


# ── one message per step ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_step_costs_one_message_whatever_the_batch():
    num_requests, num_tokens = 12, 20
    async with (
        fake_pair(decode_blocks=256, prefill_blocks=256) as pair,
        loopback(decode_handler(pair.decode)) as (_, channel),
    ):
        pair.decode_gate.is_open = False
        call = open_stream(channel)
        for number in range(num_requests):
            request = make_request([number + 1] * 9, num_tokens, request_id=str(number))
            await call.write(decode_pb2.ClientMessage(submit=generate_to_proto(request)))
        answers: dict[str, list[int]] = {str(number): [] for number in range(num_requests)}
        while not all(answers.values()):  # first tokens come as their shipments do
            read_into(answers, await call.read())
        await until(lambda: pair.decode.load().num_running == num_requests)
        await asyncio.sleep(0.05)  # a first step may have begun with some of them; it is held at the gate
        pair.decode_gate.permits.release()
        sizes = []
        while any(len(tokens) < num_tokens for tokens in answers.values()):
            message = await call.read()
            sizes.append(read_into(answers, message))
            pair.decode_gate.permits.release()
        pair.decode_gate.let_all()
        call.cancel()
    assert answers == {str(n): fake_answer([n + 1] * 9, num_tokens) for n in range(num_requests)}
    assert len(sizes) <= num_tokens + 1
    assert sizes.count(num_requests) >= num_tokens - 4


def open_stream(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    return channel.stream_stream(
        f"/{SERVICE}/Generate",
        request_serializer=decode_pb2.ClientMessage.SerializeToString,
        response_deserializer=decode_pb2.StepMessage.FromString,
    )()


def read_into(answers: dict[str, list[int]], message: decode_pb2.StepMessage) -> int:
    """How many requests the message had tokens for."""
    events = [event_from_proto(event) for event in message.events]
    assert not any(isinstance(event, Failed) for event in events), events
    with_tokens = [event for event in events if isinstance(event, Tokens)]
    for event in with_tokens:
        answers[event.request_id] += [token.token_id for token in event.tokens]
    return len(with_tokens)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Refusing:
    """A worker that accepts nothing."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def submit(self, request: GenerateRequest, sink: Callable[[GenerateEvent], None]) -> object:
        raise self._error

    def cancel(self, task: object) -> None:
        raise AssertionError("there is nothing to cancel")


@pytest.mark.parametrize(
    "error",
    [
        QueueFull("full, naïve ✓\nsecond line", retry_after_s=2.5, worker_id="decode-7"),
        RequestNeverFits("too large", param="max_tokens", code="my_code"),
        Draining("", retry_after_s=0.0),
        ShipmentCorrupt("x" * 100_000, worker_id="prefill-1"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_cross_whole(error):
    async with over_grpc(Refusing(error)) as client:
        arrived = await failure(client, make_request(PROMPT))
    assert type(arrived) is type(error)
    assert (arrived.message, arrived.param, arrived.code, arrived.retry_after_s, arrived.worker_id) == (
        error.message,
        error.param,
        error.code,
        error.retry_after_s,
        error.worker_id,
    )


async def failure(client: DecodeClient, request: GenerateRequest) -> PacklightError:
    """The error of a refused request: a worker in this process raises it, one elsewhere reports it."""
    try:
        tokens, event = await collect(client, request)
    except PacklightError as error:
        return error
    assert tokens == []
    assert isinstance(event, Failed)
    return event.error


async def test_refusals(reach):
    async with (
        fake_pair(decode=DecodeConfig(max_batch=1, max_queue=1)) as pair,
        reach(pair.decode) as client,
    ):
        assert isinstance(await failure(client, make_request(PROMPT, 10_000)), RequestNeverFits)
        pair.decode_gate.is_open = False
        accepted = []
        for number in range(2):
            accepted.append(asyncio.create_task(answer(client, make_request(PROMPT, request_id=str(number)))))
            await until(lambda expected=number + 1: pair.decode.num_unfinished == expected)
        full = await failure(client, make_request(PROMPT, request_id="too many"))
        assert isinstance(full, QueueFull)
        assert full.retry_after_s == 1.0
        pair.decode.drain()
        assert isinstance(await failure(client, make_request(PROMPT, request_id="late")), Draining)
        pair.decode_gate.let_all()
        assert await asyncio.gather(*accepted) == [fake_answer(PROMPT, 8)] * 2


async def test_a_bug_in_the_worker_costs_one_request_not_the_stream():
    async with fake_pair() as pair:
        poisoned = Poisoned(pair.decode)
        async with loopback(decode_handler(poisoned)) as (_, channel):
            client = GrpcDecodeClient(channel, DECODE_ID)
            neighbour = await begin(client, make_request(PROMPT, 30, request_id="neighbour"))
            arrived = await failure(client, make_request(PROMPT, request_id="poison"))
            assert isinstance(arrived, InternalError)
            assert "KeyError" in arrived.message
            assert isinstance((await rest_of(neighbour))[1], Finished)
            await client.close()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"pack": {"pooling": "of a later release"}}, InvalidRequest), ({"token_ids": b"cut"}, InternalError)],
    ids=["unknown", "cut"],
)
async def test_a_request_that_is_not_understood_costs_itself_not_the_stream(wrong, error):
    async with fake_pair() as pair, loopback(decode_handler(pair.decode)) as (_, channel):
        client = GrpcDecodeClient(channel, DECODE_ID)
        pair.decode_gate.is_open = False  # the neighbour does not get to its end
        neighbour = await begin(client, make_request(PROMPT, 30, request_id="neighbour"))
        strange = decode_pb2.GenerateRequest(request_id="strange", **wrong)
        answered = client._stream._requests["strange"] = asyncio.Queue()
        client._stream._outgoing.put_nowait(decode_pb2.ClientMessage(submit=strange))
        assert isinstance((await answered.get()).error, error)
        pair.decode_gate.let_all()
        assert isinstance((await rest_of(neighbour))[1], Finished)
        await client.close()


async def test_a_request_that_cannot_be_sent_leaves_nothing_behind():
    async with fake_pair() as pair, over_grpc(pair.decode) as client:
        with pytest.raises(ValueError, match="out of range"):
            await answer(client, make_request(PROMPT, 2**40))
        assert client.is_idle
        assert await answer(client, make_request(PROMPT)) == fake_answer(PROMPT, 8)


class Poisoned:
    """A worker that stumbles over one request."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker, self.cancel = worker, worker.cancel

    def submit(self, request, sink):
        if request.request_id == "poison":
            raise KeyError("a bug")
        return self._worker.submit(request, sink)


async def test_a_step_that_raises_fails_its_requests_only(reach):
    async with fake_pair() as pair, reach(pair.decode) as client:
        pair.decode_gate.error = ValueError("boom")
        _, event = await collect(client, make_request(PROMPT))
        assert isinstance(event.error, InternalError)
        assert "boom" in event.error.message
        pair.decode_gate.error = None
        assert await answer(client, make_request(PROMPT, request_id="next")) == fake_answer(PROMPT, 8)


async def test_a_deadline_is_a_terminal_event_and_frees_everything(reach):
    async with fake_pair() as pair, reach(pair.decode) as client:
        pair.prefill_gate.is_open = False
        tokens, event = await collect(client, make_request(PROMPT, deadline_s=0.05))
        assert tokens == []
        assert isinstance(event.error, DeadlineExceeded)
        assert has_free_pages(pair.decode)


# ── ends: whoever stops reading frees the other end ──────────────────────────────────────────────────────────────────


async def test_closing_frees_the_pages_within_one_step(reach):
    async with fake_pair() as pair, reach(pair.decode) as client:
        events = await begin(client, make_request(PROMPT, 200), 5)
        pair.decode_gate.is_open = False
        await events.aclose()
        steps = pair.decode_gate.num_steps
        await until(lambda: all(task.cancelled for task in pair.decode._roster.admitted))
        pair.decode_gate.let_all()
        await until(lambda: pair.decode.num_unfinished == 0)
        assert pair.decode_gate.num_steps <= steps + 2  # one may have begun before the gate fell
        pair.check_idle()


@pytest.mark.parametrize("stage", ["queued", "fetching"])
async def test_closing_before_the_first_token(reach, stage):
    async with fake_pair(decode=DecodeConfig(max_batch=1)) as pair, reach(pair.decode) as client:
        pair.prefill_gate.is_open = False
        tasks = [asyncio.create_task(answer(client, make_request(PROMPT, request_id="first")))]
        await until(lambda: pair.decode.load().num_running == 1)
        tasks.append(asyncio.create_task(answer(client, make_request(PROMPT, request_id="second"))))
        await until(lambda: pair.decode.load().num_queued == 1)
        doomed, survivor = (tasks[1], tasks[0]) if stage == "queued" else (tasks[0], tasks[1])
        doomed.cancel()
        await until(lambda: pair.decode.num_unfinished == 1)
        pair.prefill_gate.let_all()
        assert await survivor == fake_answer(PROMPT, 8)


async def test_cancelling_one_does_not_disturb_the_others(reach):
    async with fake_pair(decode_blocks=512, prefill_blocks=128) as pair, reach(pair.decode) as client:
        prompts = {str(number): [number + 1] * 9 for number in range(8)}
        streams = {
            name: await begin(client, make_request(prompt, 60, request_id=name)) for name, prompt in prompts.items()
        }
        for name in ("1", "4", "6"):
            await streams.pop(name).aclose()
        for name, events in streams.items():
            tokens, end = await rest_of(events)
            assert tokens == fake_answer(prompts[name], 60)[1:]
            assert isinstance(end, Finished)
        await until(lambda: pair.decode.num_unfinished == 0)
        assert has_free_pages(pair.decode)


async def test_a_router_that_goes_cancels_all_its_requests_and_nobody_elses():
    async with fake_pair(decode_blocks=512) as pair, loopback(decode_handler(pair.decode)) as (_, channel):
        staying, leaving = GrpcDecodeClient(channel, DECODE_ID), GrpcDecodeClient(channel, DECODE_ID)
        pair.decode_gate.is_open = False  # first tokens come from prefill; no answer gets to its end
        kept = await begin(staying, make_request(PROMPT, 100, request_id="same id"))
        lost = [await begin(leaving, make_request(PROMPT, 100, request_id=name)) for name in ("same id", "other id")]
        assert pair.decode.num_unfinished == 3
        await leaving.close()
        for events in lost:
            assert isinstance((await rest_of(events))[1].error, WorkerLost)
        await until(lambda: sum(not task.cancelled for task in pair.decode._roster.admitted) == 1)
        pair.decode_gate.let_all()
        assert (await rest_of(kept))[0] == fake_answer(PROMPT, 100)[1:]
        assert pair.decode.num_unfinished == 0
        await staying.close()


# ── the other end goes away (gRPC only) ──────────────────────────────────────────────────────────────────────────────


async def test_nobody_there_is_a_lost_worker_at_once():
    async with fake_pair() as pair, loopback(decode_handler(pair.decode)) as (server, channel):
        await server.stop()
        client = GrpcDecodeClient(channel, DECODE_ID)
        error = await failure(client, make_request(PROMPT))
        assert isinstance(error, WorkerLost)
        assert error.worker_id == DECODE_ID
        await client.close()


async def test_a_server_that_stops_loses_every_request_and_serves_again_when_it_is_back():
    async with fake_pair() as pair, loopback(decode_handler(pair.decode)) as (server, channel):
        client = GrpcDecodeClient(channel, DECODE_ID)
        pair.decode_gate.is_open = False
        streams = [await begin(client, make_request([i + 1] * 9, 60, request_id=str(i))) for i in range(3)]
        await server.stop()
        for events in streams:
            _, end = await rest_of(events)
            assert isinstance(end, Failed)
            assert isinstance(end.error, WorkerLost)
            assert end.error.worker_id == DECODE_ID
        pair.decode_gate.let_all()
        await until(lambda: pair.decode.num_unfinished == 0)
        assert has_free_pages(pair.decode)
        await server.start_again()
        assert await answer(client, make_request(PROMPT)) == fake_answer(PROMPT, 8)
        await client.close()


# ── the router's clients, one for each life of a worker ──────────────────────────────────────────────────────────────


def info(address: str, generation: int) -> WorkerInfo:
    return WorkerInfo(DECODE_ID, generation, Role.DECODE, address, "fake", "f", "c")


async def test_a_worker_that_starts_again_gets_a_fresh_client():
    async with fake_pair() as pair, loopback(decode_handler(pair.decode)) as (server, _):
        clients = GrpcDecodeClients()
        first, second = info(server.address, 1), info(server.address, 2)
        client = clients.get(first)
        assert clients.get(replace(first, draining=True)) is client
        assert await answer(client, make_request(PROMPT, request_id="1")) == fake_answer(PROMPT, 8)
        await server.stop()
        assert isinstance(await failure(client, make_request(PROMPT, request_id="2")), WorkerLost)
        await server.start_again()
        assert clients.get(second) is not client
        # At once, whatever the old connection thinks of the address.
        assert await answer(clients.get(second), make_request(PROMPT, request_id="3")) == fake_answer(PROMPT, 8)
        await clients.forget(first)
        assert await answer(clients.get(second), make_request(PROMPT, request_id="4")) == fake_answer(PROMPT, 8)
        await clients.close()


async def test_forgetting_a_worker_closes_its_connection_but_not_on_an_answer():
    """It may only have been silent: off the board, and still answering."""
    async with fake_pair() as pair, loopback(decode_handler(pair.decode)) as (server, _):
        clients, worker = GrpcDecodeClients(), info(server.address, 1)
        silent = clients.get(worker)
        events = await begin(silent, make_request(PROMPT, 60, request_id="1"))
        await clients.forget(worker)
        assert (await rest_of(events))[0] == fake_answer(PROMPT, 60)[1:]
        back = clients.get(worker)
        await asyncio.gather(*clients._closing)  # it went with its last answer
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            await answer(silent, make_request(PROMPT, request_id="late"))
        assert await answer(back, make_request(PROMPT, request_id="2")) == fake_answer(PROMPT, 8)
        await clients.forget(worker)
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            await answer(back, make_request(PROMPT, request_id="3"))
        await clients.forget(worker)  # nothing is left to forget
        await clients.close()
