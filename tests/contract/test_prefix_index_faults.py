"""The prefix index in Redis when Redis is killed, frozen, flushed, robbed, or shared by several routers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from packlight.core.config import IndexConfig
from packlight.core.hashing import page_hashes
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.registry import build_index
from tests.support.clock import FakeClock
from tests.support.redis_servers import ENGINES, RedisServer, running_server
from tests.support.waiting import eventually

MODEL = "model"
A, B = Holder("a", 1), Holder("b", 1)
PATH = page_hashes(range(64), 1, fingerprint=MODEL)
OTHER = page_hashes(range(100, 164), 1, fingerprint=MODEL)
BREAKER_S = 5.0
PATIENT_S = 10.0
"""A time-out that a busy machine does not reach: what comes of it is the server's doing."""
AT_ONCE_S = 3.0
"""Left alone, redis-py tries a dead server for 4 s."""

OpenIndex = Callable[[], PrefixIndex]


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def open_index(server: RedisServer, clock: FakeClock) -> AsyncIterator[OpenIndex]:
    """Every index opened is closed again."""
    opened: list[PrefixIndex] = []

    def open_index() -> PrefixIndex:
        config = IndexConfig(backend="redis", timeout_s=PATIENT_S, breaker_s=BREAKER_S)
        opened.append(build_index(config, {"REDIS_URL": server.url}, clock))
        return opened[-1]

    yield open_index
    for index in opened:
        await index.close()


@pytest.fixture
def index(open_index: OpenIndex) -> PrefixIndex:
    return open_index()


@pytest.fixture
async def impatient(server: RedisServer) -> AsyncIterator[PrefixIndex]:
    """In real time. On a busy machine a server that is well may be too slow for it: then it tries again soon."""
    config = IndexConfig(backend="redis", timeout_s=0.1, breaker_s=0.05)
    index = build_index(config, {"REDIS_URL": server.url}, time.monotonic)
    yield index
    server.thaw()
    await index.close()


async def publish(index: PrefixIndex, holder: Holder = A, *paths: list[bytes]) -> int:
    """What a prefill worker does when it starts or its epoch changed. Returns the epoch it then knows."""

    async def is_published() -> bool:
        nonlocal epoch
        epoch, num_dropped = await index.enroll(MODEL, holder), index.num_dropped
        for path in paths or (PATH,):
            await index.insert(MODEL, holder, path)
        return index.num_dropped == num_dropped and await index.enroll(MODEL, holder) == epoch

    epoch = 0
    await eventually(is_published)
    return epoch


async def match_until_away(index: PrefixIndex) -> float:
    """How long the quickest of the calls took that nobody answered."""
    took_s: list[float] = []

    async def is_away() -> bool:
        started = time.monotonic()
        assert await index.match(MODEL, PATH) == {}
        took_s.append(time.monotonic() - started)
        return not index.available

    await eventually(is_away)
    return min(took_s)


async def until_matched(index: PrefixIndex, num_pages: int) -> None:
    async def is_matched() -> bool:
        return await index.match(MODEL, PATH) == {"a": num_pages}

    await eventually(is_matched)


async def test_a_killed_server_costs_hits_and_nothing_else(
    index: PrefixIndex, server: RedisServer, clock: FakeClock
) -> None:
    epoch = await publish(index)
    server.kill()
    started = time.monotonic()
    assert await index.match(MODEL, PATH) == {}
    assert time.monotonic() - started < AT_ONCE_S
    assert not index.available
    num_dropped = index.num_dropped
    await index.insert(MODEL, A, OTHER)
    await index.remove(MODEL, A, PATH, keep=3)
    await index.drop_worker(MODEL, "b", 1)
    assert index.num_dropped == num_dropped + 3
    assert await index.enroll(MODEL, A) == epoch

    server.start()
    assert await index.match(MODEL, PATH) == {}, "left alone until the breaker lets one try"
    clock.advance(BREAKER_S)
    assert await index.enroll(MODEL, A) != epoch
    assert index.available
    await publish(index)
    assert await index.match(MODEL, PATH) == {"a": 64}


async def test_a_server_that_comes_late_is_found(index: PrefixIndex, server: RedisServer, clock: FakeClock) -> None:
    server.kill()
    assert await index.enroll(MODEL, A) == 0
    assert not index.available
    server.start()
    clock.advance(BREAKER_S)
    await publish(index)
    assert await index.match(MODEL, PATH) == {"a": 64}


async def test_nobody_waits_for_a_frozen_server(
    index: PrefixIndex, impatient: PrefixIndex, server: RedisServer
) -> None:
    await publish(index)
    await until_matched(impatient, 64)
    server.freeze()
    assert await match_until_away(impatient) < 0.5
    server.thaw()
    await until_matched(impatient, 64)  # nothing was lost: nobody wrote meanwhile
    assert impatient.available


@pytest.mark.parametrize("lost", ["insert", "remove"])
async def test_a_lost_write_makes_the_holder_start_over(
    index: PrefixIndex, impatient: PrefixIndex, server: RedisServer, lost: str
) -> None:
    """The server gets the lost write when it thaws. Neither that nor its absence leaves a false claim behind."""
    epoch = await publish(impatient)
    server.freeze()
    if lost == "insert":
        await impatient.insert(MODEL, A, OTHER)
    else:
        await impatient.remove(MODEL, A, PATH, keep=3)
    await match_until_away(impatient)
    server.thaw()

    async def starts_over() -> bool:
        return await impatient.enroll(MODEL, A) != epoch

    await eventually(starts_over)
    assert await index.match(MODEL, OTHER) == await index.match(MODEL, PATH) == {}
    await publish(impatient, A, PATH[:10])
    assert await index.match(MODEL, PATH) == {"a": 10}


async def test_a_flush_costs_misses_until_the_holders_report_again(index: PrefixIndex, server: RedisServer) -> None:
    epoch_a, epoch_b = await publish(index), await publish(index, B)
    server.command("FLUSHALL")
    assert await index.match(MODEL, PATH) == {}
    assert index.available
    assert await index.enroll(MODEL, A) != epoch_a
    assert await index.enroll(MODEL, B) != epoch_b
    await publish(index)
    assert await index.match(MODEL, PATH) == {"a": 64}


async def test_a_write_after_a_flush_is_kept(index: PrefixIndex, server: RedisServer) -> None:
    epoch = await publish(index)
    server.command("FLUSHALL")
    await index.insert(MODEL, A, OTHER)
    assert await index.match(MODEL, OTHER) == {"a": 64}
    assert await index.enroll(MODEL, A) != epoch


@pytest.mark.parametrize("part", ["meta", "edges", "claims", "lru"])
async def test_an_evicted_key_costs_the_whole_index_and_is_noticed(
    index: PrefixIndex, server: RedisServer, part: str
) -> None:
    """A server short of memory may evict one key and keep the others."""
    epoch = await publish(index, A, PATH, OTHER)
    assert server.command("DEL", f"packlight:prefix:{{{MODEL}}}:{part}") == b":1\r\n"
    assert set(await index.match(MODEL, PATH)) <= {"a"}
    assert await index.enroll(MODEL, A) != epoch
    assert await index.match(MODEL, PATH) == {}
    await publish(index)
    assert await index.match(MODEL, PATH) == {"a": 64}


async def test_a_forgotten_script_is_sent_again(index: PrefixIndex, server: RedisServer) -> None:
    await publish(index)
    server.command("SCRIPT", "FLUSH")
    assert await index.match(MODEL, PATH) == {"a": 64}


async def test_routers_see_what_workers_report_elsewhere(open_index: OpenIndex) -> None:
    worker_a, worker_b, router_1, router_2 = (open_index() for _ in range(4))
    epoch = await publish(worker_a)
    await publish(worker_b, B, PATH[:20])
    assert await router_1.match(MODEL, PATH) == await router_2.match(MODEL, PATH) == {"a": 64, "b": 20}
    await router_1.drop_worker(MODEL, "a", 1)
    assert await router_2.match(MODEL, PATH) == {"b": 20}
    assert await worker_a.enroll(MODEL, A) != epoch, "it lives, and learns that it must report again"
    await publish(worker_a)
    assert await router_2.match(MODEL, PATH) == {"a": 64, "b": 20}


async def test_two_that_speak_for_one_holder_agree_in_the_end(open_index: OpenIndex) -> None:
    """A mistake of the deployment (two processes, one id and generation) must not make the claims flap for ever."""
    one, two = open_index(), open_index()
    await publish(one)
    await publish(two)
    epochs = await one.enroll(MODEL, A), await two.enroll(MODEL, A)
    for _ in range(3):
        await one.insert(MODEL, A, PATH)
        await two.insert(MODEL, A, OTHER)
        assert (await one.enroll(MODEL, A), await two.enroll(MODEL, A)) == epochs
    assert await one.match(MODEL, PATH) == await two.match(MODEL, OTHER) == {"a": 64}


async def test_concurrent_writes_of_a_holder_stay_in_order(index: PrefixIndex) -> None:
    epoch = await publish(index)
    for _ in range(20):
        await asyncio.gather(index.insert(MODEL, A, OTHER), index.remove(MODEL, A, OTHER, keep=5))
        assert await index.match(MODEL, OTHER) == {"a": 5}
    assert await index.enroll(MODEL, A) == epoch


async def test_the_index_of_a_retired_model_expires(index: PrefixIndex, server: RedisServer) -> None:
    await publish(index)
    for part in ("meta", "edges", "claims", "lru"):
        assert int(server.command("TTL", f"packlight:prefix:{{{MODEL}}}:{part}")[1:]) > 3600


async def test_redis_sees_hashes_only(index: PrefixIndex, server: RedisServer) -> None:
    await publish(index)
    keys = server.command("KEYS", "*")
    assert keys.count(b"packlight:prefix:{model}:") == 4
    assert keys.startswith(b"*4\r\n")
