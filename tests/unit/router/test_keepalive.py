"""Comments on a silent stream: when they come, and that they never get in the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from packlight.router.keepalive import KeepAlive
from packlight.router.sse import Reply

COMMENT, DONE, PART = b": keep-alive\n\n", b"data: [DONE]\n\n", b'data: {"a":1}\n\n'


class Client:
    """What was sent to it; it reads nothing while `reads` is not set."""

    def __init__(self) -> None:
        self.bodies: asyncio.Queue[bytes] = asyncio.Queue()
        self.asked = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, message: Any) -> None:
        self.asked.set()
        await self.reads.wait()
        if message["type"] == "http.response.body":
            self.bodies.put_nowait(message["body"])

    async def next(self) -> bytes:
        return await asyncio.wait_for(self.bodies.get(), 60)

    def rest(self) -> list[bytes]:
        return [self.bodies.get_nowait() for _ in range(self.bodies.qsize())]


async def open_stream() -> tuple[Client, Reply]:
    client = Client()
    reply = Reply(client.send)
    await reply.open_stream({})
    return client, reply


async def test_a_silent_stream_gets_comment_after_comment() -> None:
    client, reply = await open_stream()
    with KeepAlive(reply, 0.001):
        assert [await client.next() for _ in range(3)] == [COMMENT] * 3


async def test_nothing_comes_after_the_block() -> None:
    client, reply = await open_stream()
    with KeepAlive(reply, 0.001):
        await client.next()
        client.reads.clear()
        client.asked.clear()
        await asyncio.wait_for(client.asked.wait(), 60)
    client.reads.set()
    await reply.close_stream()
    assert client.rest()[-1] == DONE
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.bodies.get(), 0.02)


async def test_a_comment_waits_for_the_part_that_is_being_sent() -> None:
    client, reply = await open_stream()
    client.reads.clear()
    with KeepAlive(reply, 60.0) as alive:
        sending = asyncio.create_task(reply.send_events([{"a": 1}]))
        await asyncio.sleep(0)
        alive._say_something()
        await asyncio.sleep(0)
        client.reads.set()
        assert [await client.next(), await client.next()] == [PART, COMMENT]
        await sending


async def test_a_stream_that_says_something_is_not_commented_on() -> None:
    client, reply = await open_stream()
    with KeepAlive(reply, 60.0) as alive:
        await reply.send_events([{"a": 1}])
        alive._look()
        await asyncio.sleep(0)
    assert client.rest() == [PART]


async def test_a_client_that_is_gone_is_not_its_business() -> None:
    client, reply = await open_stream()

    async def fail(_: Any) -> None:
        client.asked.set()
        raise OSError("gone")

    reply._send = fail
    client.asked.clear()
    with KeepAlive(reply, 0.001):
        await asyncio.wait_for(client.asked.wait(), 60)
