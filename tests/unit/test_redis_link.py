"""The link to Redis against real servers that are killed, frozen, demoted and kept busy."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from packlight.core.errors import ConfigError
from packlight.redis_link.link import MAX_CONNECTIONS, RedisAway, RedisLink, redis_url
from packlight.redis_link.script import Script
from tests.support.clock import FakeClock
from tests.support.redis_servers import ENGINES, RedisServer, running_server
from tests.support.waiting import eventually

TIMEOUT_S = 0.1
COOLDOWN_S = 5.0


def script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode()).hexdigest())


ECHO = script("return ARGV[1]")
WRITE = script("return redis.call('INCR', KEYS[1])")


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def link(server: RedisServer, clock: FakeClock) -> AsyncIterator[RedisLink]:
    link = RedisLink(server.url, timeout_s=TIMEOUT_S, cooldown_s=COOLDOWN_S, clock=clock)
    yield link
    server.thaw()
    await link.close()


async def echo(link: RedisLink, text: str) -> str:
    """Patient: a lone time-out on a busy machine is not what these tests are about."""
    try:
        return (await link.run(ECHO, [], [text])).decode()
    except RedisAway:
        if not link.available:
            raise
        return (await link.run(ECHO, [], [text])).decode()


async def go_away(link: RedisLink) -> None:
    """Call a server that is frozen or dead until the link has seen it."""
    async with asyncio.timeout(10):
        while link.available:
            with pytest.raises(RedisAway):
                await link.run(ECHO, [], ["lost"])


def num_clients(server: RedisServer) -> int:
    return server.command("CLIENT", "LIST", "TYPE", "normal").count(b" name=")


async def test_runs_scripts_the_server_has_not_seen(link: RedisLink, server: RedisServer) -> None:
    assert await echo(link, "a") == "a"
    assert b"OK" in server.command("SCRIPT", "FLUSH")
    assert await echo(link, "b") == "b"


async def test_a_dead_server_fails_at_once_and_heals(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    await echo(link, "before")
    server.kill()
    with pytest.raises(RedisAway):
        await link.run(ECHO, [], ["lost"])
    assert not link.available
    server.start()
    with pytest.raises(RedisAway, match="left alone"):
        await link.run(ECHO, [], ["too soon"])
    clock.advance(COOLDOWN_S)
    assert await echo(link, "after") == "after"
    assert link.available
    assert link.num_heals == 1


async def test_nobody_waits_for_a_frozen_server(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    await echo(link, "before")
    server.freeze()
    started = time.monotonic()
    with pytest.raises(RedisAway):
        await link.run(ECHO, [], ["lost"])
    assert time.monotonic() - started < 5 * TIMEOUT_S
    await go_away(link)
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(RedisAway):
            await link.run(ECHO, [], ["refused"])
    assert time.monotonic() - started < TIMEOUT_S
    server.thaw()
    clock.advance(COOLDOWN_S)
    assert await echo(link, "after") == "after"


async def test_a_late_reply_reaches_nobody(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    """Calls cut off by the deadline, and calls whose caller left: the next ones get their own answers."""
    await echo(link, "before")
    server.freeze()
    calls = [asyncio.create_task(link.run(ECHO, [], [f"late {i}"])) for i in range(2 * MAX_CONNECTIONS)]
    await asyncio.sleep(TIMEOUT_S / 4)
    for call in calls[::2]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError, RedisAway}
    server.thaw()
    clock.advance(COOLDOWN_S)
    assert [await echo(link, f"own {i}") for i in range(50)] == [f"own {i}" for i in range(50)]


async def test_a_probe_whose_caller_left_makes_room_for_the_next(
    link: RedisLink, server: RedisServer, clock: FakeClock
) -> None:
    server.freeze()
    await go_away(link)
    clock.advance(COOLDOWN_S)
    probe = asyncio.create_task(link.run(ECHO, [], ["probe"]))
    await asyncio.sleep(TIMEOUT_S / 4)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    server.thaw()
    assert await echo(link, "next") == "next"


async def test_a_demoted_server_is_left_behind(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    """After a failover the old connections lead to a replica. None of them is used again."""
    await link.run(WRITE, ["key"], [])
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(RedisAway, match=r"(?i)read.?only"):
        await link.run(WRITE, ["key"], [])
    assert not link.available
    await eventually(lambda: num_clients(server) == 1)  # the one that asks
    server.command("REPLICAOF", "NO", "ONE")
    clock.advance(COOLDOWN_S)
    assert await link.run(WRITE, ["key"], []) == 2


async def test_a_busy_process_does_not_blame_the_server(link: RedisLink) -> None:
    await echo(link, "before")
    for _ in range(3):
        call = asyncio.create_task(link.run(ECHO, [], ["late"]))
        await asyncio.sleep(0)
        time.sleep(3 * TIMEOUT_S)  # noqa: ASYNC251 - the event loop is to stall
        with pytest.raises(RedisAway):
            await call
    assert link.available


async def test_a_burst_waits_its_turn(link: RedisLink, server: RedisServer) -> None:
    await asyncio.gather(*(link.run(ECHO, [], [str(i)]) for i in range(200)), return_exceptions=True)
    assert link.available
    assert num_clients(server) <= MAX_CONNECTIONS + 1


def test_the_address_is_checked() -> None:
    assert redis_url("redis://a", {"REDIS_URL": "redis://b"}, "x", "") == "redis://a"
    assert redis_url(None, {"REDIS_URL": "redis://b"}, "x", "") == "redis://b"
    with pytest.raises(ConfigError, match=r"index needs .* set REDIS_URL"):
        redis_url(None, {}, "index", "")
    with pytest.raises(ConfigError) as refused:
        RedisLink("http://user:secret@host", timeout_s=1, cooldown_s=1, clock=time.monotonic)
    assert "redis://" in str(refused.value)
    assert "secret" not in str(refused.value)
