"""A client that leaves, at every stage; draining; admission. Each request ends in exactly one outcome."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from packlight.core.errors import WorkerLost
from tests.support.router_harness import CHAT, Connection, Harness, chat_body, serving
from tests.support.scripted_backend import End, Fail, Say, Wait, one_by_one


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_said", [0, 1, 20])
async def test_leaving_closes_the_backend(num_said: int, stream: bool) -> None:
    harness = Harness([*[Say([80])] * num_said, Wait(), End()])
    connection = Connection(harness.app, CHAT, chat_body(stream=stream, n=2))
    await harness.backend.until(lambda: list(harness.backend.num_steps.values()) == [num_said + 1] * 2)
    connection.leave()
    await asyncio.wait_for(connection.task, 60)
    assert list(harness.backend.ended.values()) == ["closed"] * 2
    assert harness.outcomes() == {"cancelled": 1.0}
    assert harness.gate.num_inside == 0
    assert harness.metric("inflight_requests", endpoint="chat") == 0
    if not stream:
        assert connection.sent == []


async def test_leaving_before_the_body_is_there() -> None:
    harness = Harness(one_by_one([80]))
    connection = Connection(harness.app, CHAT, b'{"model":', more_body=True)
    await asyncio.sleep(0)
    connection.leave()
    await asyncio.wait_for(connection.task, 60)
    assert harness.backend.requests == []
    assert harness.outcomes() == {"cancelled": 1.0}


async def test_leaving_after_the_answer_changes_nothing() -> None:
    harness = Harness(one_by_one([80]))
    connection = Connection(harness.app, CHAT, chat_body())
    await connection.until_received(2)
    connection.leave()
    await connection.task
    assert harness.outcomes() == {"completed": 1.0}
    assert harness.backend.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_over_a_real_socket(stream: bool) -> None:
    harness = Harness([Say([80]), Wait()])
    async with serving(harness.app) as url, httpx.AsyncClient(base_url=url) as client:
        request = asyncio.create_task(client.post(CHAT, json=chat_body(stream=stream)))
        await harness.backend.until(lambda: list(harness.backend.num_steps.values()) == [2])
        request.cancel()
        await harness.backend.until(lambda: harness.backend.num_open == 0)
        assert set(harness.backend.ended.values()) == {"closed"}
        async with asyncio.timeout(60):
            await harness.gate.drained()
    assert harness.outcomes() == {"cancelled": 1.0}


async def test_a_server_that_is_stopped_hard_closes_the_backend() -> None:
    harness = Harness([Say([80]), Wait()])
    connection = Connection(harness.app, CHAT, chat_body(stream=True))
    await connection.until_received(2)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert set(harness.backend.ended.values()) == {"closed"}
    assert harness.outcomes() == {"cancelled": 1.0}


async def test_draining_refuses_new_requests_and_finishes_running_ones() -> None:
    go = Wait()
    harness = Harness([Say([80]), go, Say([81]), End()])
    connection = Connection(harness.app, CHAT, chat_body(stream=True))
    await connection.until_received(2)
    harness.gate.drain()
    refused = await harness.chat()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-should-retry"] == "true"
    async with harness.client() as client:
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health")).json()["draining"] is True
        assert (await client.get("/health/live")).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert "packlight_router_draining 1.0" in metrics
        assert "packlight_router_ready 0.0" in metrics
    drained = asyncio.create_task(harness.gate.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    go.event.set()
    await asyncio.wait_for(drained, 60)
    await connection.task
    assert connection.sent[-1]["body"] == b"data: [DONE]\n\n"
    assert harness.outcomes() == {"completed": 1.0, "refused": 1.0}


@pytest.mark.parametrize("stream", [True, False])
async def test_what_draining_cannot_wait_for_ends_with_an_error(stream: bool) -> None:
    harness = Harness([Say([80]), Wait(), End()])
    connection = Connection(harness.app, CHAT, chat_body(stream=stream))
    await harness.backend.until(lambda: list(harness.backend.num_steps.values()) == [2])
    harness.gate.drain()
    harness.gate.give_up()
    await asyncio.wait_for(harness.gate.drained(), 60)
    await connection.task
    body = b"".join(message.get("body", b"") for message in connection.sent)
    assert b'"code":"draining"' in body
    assert connection.sent[0]["status"] == (200 if stream else 503)
    assert list(harness.backend.ended.values()) == ["closed"]
    assert harness.outcomes() == {"refused": 1.0}


async def test_one_request_too_many_is_a_429() -> None:
    go = Wait()
    harness = Harness([go, *one_by_one([80])], max_inflight=3)
    first = Connection(harness.app, CHAT, chat_body(n=2))
    await harness.backend.until(lambda: harness.backend.num_open == 2)
    for body in (chat_body(n=2), chat_body(n=3)):
        refused = await harness.post(CHAT, body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    second = Connection(harness.app, CHAT, chat_body())
    await harness.backend.until(lambda: harness.backend.num_open == 3)
    assert (await harness.chat()).status_code == 429
    go.event.set()
    await asyncio.gather(first.task, second.task)
    assert harness.gate.num_inside == 0
    assert (await harness.chat()).status_code == 200
    assert harness.outcomes() == {"completed": 3.0, "refused": 3.0}


async def test_every_request_of_a_storm_ends_once() -> None:
    """Answers, failures and departures at once: as many outcomes as requests, and nothing left open."""

    def script(request: Any) -> Any:
        return ([Say([80]), Wait()], one_by_one([80, 81]), [Fail(WorkerLost("gone"))])[request.sampling.seed % 3]

    harness = Harness(script, max_inflight=64)
    connections = [Connection(harness.app, CHAT, chat_body(seed=seed, stream=seed % 2 == 0)) for seed in range(30)]
    await harness.backend.until(lambda: len(harness.backend.requests) == 30 and harness.backend.num_open == 10)
    for connection in connections:
        connection.leave()
    await asyncio.wait_for(asyncio.gather(*(connection.task for connection in connections)), 60)
    assert harness.outcomes() == {"cancelled": 10.0, "completed": 10.0, "failed": 10.0}
    assert harness.backend.num_open == 0
    assert harness.gate.num_inside == 0
