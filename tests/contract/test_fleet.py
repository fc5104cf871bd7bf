"""What every fleet registry does, asked of each: in memory, in Redis and in Valkey; and what Redis can do to one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from packlight.core.config import FleetConfig
from packlight.core.errors import ConfigError
from packlight.core.workers import Role, WorkerInfo, WorkerLoad
from packlight.fleet.base import Fleet, FleetAway
from packlight.fleet.memory import MemoryFleet
from packlight.fleet.redis_fleet import RedisFleet
from packlight.fleet.registry import build_fleet
from packlight.redis_link.link import RedisLink
from tests.support.clock import FakeClock
from tests.support.redis_servers import ENGINES, RedisServer, running_server
from tests.support.waiting import eventually

PATIENT_S = 10.0
LONG_TTL_S = 300.0
SHORT_TTL_S = 0.5

PREFILL = WorkerInfo("p0", 1, Role.PREFILL, "10.0.0.1:7000", "smol", "fp", "compat", load=WorkerLoad(num_queued=3))
DECODE = WorkerInfo("d0", 1, Role.DECODE, "10.0.0.2:7000", "smol", "fp", "compat", max_context=2048, draining=True)

OpenFleet = Callable[[float], Fleet]


@pytest.fixture(scope="module", params=["memory", *ENGINES])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer | None]:
    if request.param == "memory":
        yield None
    else:
        with running_server(request.param) as server:
            yield server


@pytest.fixture
async def open_fleet(server: RedisServer | None) -> AsyncIterator[OpenFleet]:
    """Opens a registry with some time to live. Every one opened is closed again."""
    opened: list[Fleet] = []

    def open_fleet(ttl_s: float) -> Fleet:
        opened.append(MemoryFleet(ttl_s, time.monotonic) if server is None else redis_fleet(server, ttl_s))
        return opened[-1]

    if server is not None:
        server.command("FLUSHALL")
    yield open_fleet
    for fleet in opened:
        await fleet.close()


@pytest.fixture
def fleet(open_fleet: OpenFleet) -> Fleet:
    return open_fleet(LONG_TTL_S)


def redis_fleet(server: RedisServer, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> RedisFleet:
    link = RedisLink(server.url, timeout_s=PATIENT_S, cooldown_s=1.0, clock=clock)
    return RedisFleet(link, ttl_s, clock)


async def workers(fleet: Fleet) -> list[WorkerInfo]:
    return [sighting.worker for sighting in await fleet.list()]


async def ids(fleet: Fleet) -> list[str]:
    return [worker.worker_id for worker in await workers(fleet)]


async def test_an_empty_fleet(fleet: Fleet) -> None:
    assert await fleet.list() == ()
    assert fleet.available


async def test_lists_what_workers_said_last_by_id(fleet: Fleet) -> None:
    await fleet.heartbeat(PREFILL)
    await fleet.heartbeat(DECODE)
    assert await workers(fleet) == [DECODE, PREFILL]
    busier = replace(PREFILL, load=WorkerLoad(num_queued=9, tokens_per_s=1234.5))
    await fleet.heartbeat(busier)
    assert await workers(fleet) == [DECODE, busier]


async def test_says_how_long_ago_that_was(fleet: Fleet) -> None:
    """In steps of a millisecond where the registry has a clock of its own."""
    started = time.monotonic()
    await fleet.heartbeat(PREFILL)

    async def is_older() -> bool:
        (sighting,) = await fleet.list()
        assert -0.01 <= sighting.age_s < time.monotonic() - started + 0.01
        return sighting.age_s > 0.05

    await eventually(is_older)
    again = time.monotonic()
    await fleet.heartbeat(PREFILL)
    assert (await fleet.list())[0].age_s < time.monotonic() - again + 0.01


async def test_a_newer_generation_takes_the_place_of_the_older(fleet: Fleet) -> None:
    reborn = replace(PREFILL, generation=2, address="10.0.0.9:7000")
    await fleet.heartbeat(PREFILL)
    await fleet.heartbeat(reborn)
    await fleet.heartbeat(PREFILL)
    assert await workers(fleet) == [reborn]
    await fleet.leave("p0", 1)
    assert await workers(fleet) == [reborn]


async def test_generations_may_be_nanoseconds(fleet: Fleet) -> None:
    older, newer = (replace(PREFILL, generation=1_800_000_000_000_000_000 + i) for i in range(2))
    await fleet.heartbeat(newer)
    await fleet.heartbeat(older)
    assert await workers(fleet) == [newer]


async def test_a_worker_that_leaves_is_listed_no_more(fleet: Fleet) -> None:
    await fleet.heartbeat(PREFILL)
    await fleet.heartbeat(DECODE)
    assert len(await fleet.list()) == 2
    await fleet.leave("p0", 1)
    await fleet.leave("stranger", 1)
    assert await workers(fleet) == [DECODE]
    await fleet.leave("d0", 7)
    assert await workers(fleet) == []


async def test_a_silent_worker_is_listed_no_more(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(SHORT_TTL_S)
    started = time.monotonic()
    await fleet.heartbeat(PREFILL)

    async def is_decode_alone() -> bool:
        await fleet.heartbeat(DECODE)
        return await ids(fleet) == ["d0"]

    await eventually(is_decode_alone)
    assert time.monotonic() - started > SHORT_TTL_S * 0.9


async def test_the_last_worker_can_fall_silent_too_and_come_back(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(SHORT_TTL_S)
    await fleet.heartbeat(PREFILL)

    async def is_empty() -> bool:
        return await ids(fleet) == []

    await eventually(is_empty)
    await eventually_listed(fleet, PREFILL)


async def test_once_silent_an_older_life_may_speak_again(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(SHORT_TTL_S)
    await fleet.heartbeat(replace(PREFILL, generation=2))
    await eventually_listed(fleet, PREFILL)


async def eventually_listed(fleet: Fleet, worker: WorkerInfo) -> None:
    async def is_listed() -> bool:
        await fleet.heartbeat(worker)
        return await workers(fleet) == [worker]

    await eventually(is_listed)


@pytest.fixture(params=ENGINES)
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_routers_see_workers_that_report_elsewhere(own_server: RedisServer) -> None:
    worker, router = redis_fleet(own_server, LONG_TTL_S), redis_fleet(own_server, LONG_TTL_S)
    await worker.heartbeat(PREFILL)
    assert await workers(router) == [PREFILL]
    await worker.close()
    await router.close()


async def test_a_dead_registry_is_away_and_heals(own_server: RedisServer, clock: FakeClock) -> None:
    fleet = redis_fleet(own_server, LONG_TTL_S, clock)
    await fleet.heartbeat(PREFILL)
    own_server.kill()
    with pytest.raises(FleetAway):
        await fleet.list()
    assert not fleet.available
    await fleet.heartbeat(PREFILL)
    await fleet.leave("p0", 1)
    own_server.start()
    clock.advance(1.0)
    await fleet.heartbeat(DECODE)
    assert await workers(fleet) == [DECODE]
    assert fleet.available
    await fleet.close()


@pytest.mark.parametrize("loss", ["flush", "restart"])
async def test_a_registry_that_lost_its_memory_loses_nobody(
    own_server: RedisServer, clock: FakeClock, loss: str
) -> None:
    """Until every worker has had the time to report to the new one."""
    fleet = redis_fleet(own_server, LONG_TTL_S, clock)
    await fleet.heartbeat(PREFILL)
    await fleet.heartbeat(DECODE)
    assert await ids(fleet) == ["d0", "p0"]
    if loss == "flush":
        own_server.command("FLUSHALL")
    else:
        own_server.kill()
        own_server.start()
        with suppress(FleetAway):  # the old connection may be noticed to be dead, or not yet
            await fleet.list()
        clock.advance(1.0)
    assert await ids(fleet) == ["d0", "p0"]
    busier = replace(PREFILL, load=WorkerLoad(num_queued=9))
    await fleet.heartbeat(busier)
    assert await workers(fleet) == [DECODE, busier]
    assert [sighting.age_s >= 0 for sighting in await fleet.list()] == [True, True]
    clock.advance(LONG_TTL_S)
    await fleet.heartbeat(busier)
    assert await workers(fleet) == [busier]
    await fleet.close()


async def test_cards_that_this_release_cannot_read_are_skipped(own_server: RedisServer) -> None:
    fleet = redis_fleet(own_server, LONG_TTL_S)
    await fleet.heartbeat(PREFILL)
    await fleet.heartbeat(DECODE)
    own_server.command("HSET", "packlight:{fleet}:cards", "p0", '"1 {\\"v\\":99}"')
    assert await workers(fleet) == [DECODE]
    await fleet.close()


async def test_the_registry_is_bounded_by_the_living(own_server: RedisServer) -> None:
    fleet = redis_fleet(own_server, 0.05)
    for number in range(20):
        await fleet.heartbeat(replace(PREFILL, worker_id=f"pod-{number}"))

    async def is_swept() -> bool:
        await fleet.heartbeat(DECODE)
        return own_server.command("HLEN", "packlight:{fleet}:cards") == b":1\r\n"

    await eventually(is_swept)
    await fleet.close()


def test_redis_without_a_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="REDIS_URL"):
        build_fleet(FleetConfig(backend="redis"), {}, time.monotonic)
    with pytest.raises(ConfigError, match="unknown fleet registry 'etcd'"):
        build_fleet(FleetConfig(backend="etcd"), {}, time.monotonic)


async def test_the_configuration_names_the_registry() -> None:
    assert isinstance(build_fleet(FleetConfig(), {}, time.monotonic), MemoryFleet)
    fleet = build_fleet(FleetConfig(backend="redis"), {"REDIS_URL": "redis://host"}, time.monotonic)
    assert isinstance(fleet, RedisFleet)
    await fleet.close()
