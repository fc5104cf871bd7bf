"""A worker process that is killed, frozen or quiet, seen from the other end of its gRPC connection."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing, asynccontextmanager
from itertools import count

import pytest

from packlight.core.config import DecodeConfig
from packlight.core.errors import WorkerLost
from packlight.core.shipping import LayerHeader
from packlight.core.types import Failed, Finished
from packlight.models.fake import fake_answer
from packlight.wire.channel import Channels
from packlight.wire.decode import GrpcDecodeClient, decode_handler
from packlight.wire.prefill import GrpcPrefillClient, prefill_handler
from tests.support.cluster import PATIENCE_S, Later, Process, loopback, running_worker
from tests.support.fake_pair import answer, collect, fake_pair, make_request, until

pytestmark = pytest.mark.e2e

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
PAGE = 4  # of `fake_pair`
LONG = [index % 50 + 1 for index in range(32_000)]
SLOW = ("prefill.chunk_tokens=1", f"kv.page_size={PAGE}")
NOTICED_WITHIN_S = 20.0  # without keepalive pings it takes a minute


@pytest.fixture(scope="module")
def slow_prefill():
    """A prefill worker that takes a step for every token."""
    with running_worker("prefill", *SLOW) as (process, address):
        yield process, address


@asynccontextmanager
async def decode_with(address: str, wrap=lambda client: client):
    """A decode worker here whose prefill worker is the process at `address`."""
    channels = Channels()
    client = wrap(GrpcPrefillClient(channels.get(address), "prefill-0"))
    inline = DecodeConfig(transports=["grpc"])  # so that payload is still under way when a process dies
    async with fake_pair(decode_blocks=40_000, decode=inline, client=lambda _: client) as pair:
        yield pair
        assert pair.decode.load().num_free_pages == pair.decode.load().num_total_pages
    await channels.close()


class StopsReading:
    """A prefill client whose reader pauses once a layer was announced: the bulk is then still on its way."""

    def __init__(self, client) -> None:
        self._client, self.go_on, self.announced = client, asyncio.Event(), asyncio.Event()

    async def prefill(self, request):
        async with aclosing(self._client.prefill(request)) as events:
            async for event in events:
                yield event
                if isinstance(event, LayerHeader):
                    self.announced.set()
                    await self.go_on.wait()


def kill(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()


async def test_a_prefill_worker_killed_in_the_middle_of_a_shipment():
    with running_worker("prefill", f"kv.page_size={PAGE}") as (process, address):
        readers = []
        async with decode_with(address, lambda client: readers.append(StopsReading(client)) or readers[0]) as pair:
            (reader,) = readers
            reader.go_on.set()
            assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)
            reader.go_on.clear()
            reader.announced.clear()
            task = asyncio.create_task(collect(pair.decode, make_request(LONG)))
            await reader.announced.wait()  # 500 kB follow; more than flow control lets pass unread
            assert pair.decode.load().num_free_pages < pair.decode.load().num_total_pages
            kill(process)
            reader.go_on.set()
            async with asyncio.timeout(NOTICED_WITHIN_S):
                _, event = await task
            assert isinstance(event, Failed)
            assert isinstance(event.error, WorkerLost)
            assert event.error.worker_id == "prefill-0"


async def test_a_frozen_prefill_worker_is_noticed_by_its_silence_on_the_wire(slow_prefill):
    process, address = slow_prefill
    async with decode_with(address) as pair:
        task = asyncio.create_task(collect(pair.decode, make_request(LONG)))
        await until(lambda: pair.decode.load().num_running == 1)
        await asyncio.sleep(0.3)
        os.kill(process.popen.pid, signal.SIGSTOP)
        for request_id in ("in progress", "new"):  # the second one meets a connection that cannot be made
            since = time.monotonic()
            _, event = await (task if request_id == "in progress" else collect(pair.decode, make_request(PROMPT)))
            assert isinstance(event.error, WorkerLost)
            assert time.monotonic() - since < NOTICED_WITHIN_S
        os.kill(process.popen.pid, signal.SIGCONT)
        await until_it_answers(pair)


async def until_it_answers(pair) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for attempt in count():
            _, event = await collect(pair.decode, make_request(PROMPT, request_id=str(attempt)))
            if isinstance(event, Finished):
                return
            await asyncio.sleep(0.05)


async def test_a_frozen_decode_worker_is_noticed_too(slow_prefill):
    """It is frozen in the middle of an answer, which is slow because its prefill worker is."""
    _, prefill_address = slow_prefill
    with running_worker("decode", f"kv.page_size={PAGE}") as (process, address):
        channels = Channels()
        client = GrpcDecodeClient(channels.get(address), "decode-0")
        task = asyncio.create_task(collect(client, make_request(LONG, prefill_address=prefill_address)))
        await asyncio.sleep(0.5)
        assert not task.done()
        os.kill(process.popen.pid, signal.SIGSTOP)
        frozen_at = time.monotonic()
        tokens, event = await task
        assert tokens == []
        assert isinstance(event.error, WorkerLost)
        assert time.monotonic() - frozen_at < NOTICED_WITHIN_S
        await client.close()
        await channels.close()


async def test_a_prefill_worker_killed_while_it_computes(slow_prefill):
    """The last test with this worker."""
    process, address = slow_prefill
    async with decode_with(address) as pair:
        tasks = [
            asyncio.create_task(collect(pair.decode, make_request(LONG[number:], request_id=str(number))))
            for number in range(4)
        ]
        await until(lambda: pair.decode.load().num_running == 4)
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks)
        kill(process)
        async with asyncio.timeout(NOTICED_WITHIN_S):
            for _, event in await asyncio.gather(*tasks):
                assert isinstance(event.error, WorkerLost)


async def test_connections_that_are_quiet_for_long_stay():
    """Three keepalive pings (one every 2 s) that a server did not expect would end them."""
    later = Later()
    async with (
        fake_pair(client=lambda _: later) as pair,
        loopback(decode_handler(pair.decode)) as (_, to_decode),
        loopback(prefill_handler(pair.prefill)) as (_, to_prefill),
    ):
        client = GrpcDecodeClient(to_decode, "decode-0")
        later.target = GrpcPrefillClient(to_prefill, "prefill-0")
        pair.prefill_gate.is_open = False
        quiet = asyncio.create_task(answer(client, make_request(PROMPT)))
        await asyncio.sleep(9.5)
        pair.prefill_gate.let_all()
        assert await quiet == fake_answer(PROMPT, 8)
        await client.close()
