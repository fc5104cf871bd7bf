"""Channels: one for each worker that is asked for, none for those that are gone."""

from __future__ import annotations

import asyncio

import grpc

from packlight.wire.channel import UNUSED_S, Channels
from tests.support.clock import FakeClock
from tests.support.cluster import loopback
from tests.support.fake_pair import until

HERE, GONE = "127.0.0.1:1", "127.0.0.1:2"


class Echo:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.was_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("echo", {"Echo": grpc.unary_unary_rpc_method_handler(self._serve)})

    async def _serve(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.was_asked.set()
        await self.may_answer.wait()
        return data


def is_closed(channel: grpc.aio.Channel) -> bool:
    """It takes no calls."""
    try:
        channel.unary_unary("/echo/Echo")(b"").cancel()
    except grpc.aio.UsageError:
        return True
    return False


async def test_a_worker_that_nobody_asks_for_is_forgotten():
    clock = FakeClock()
    channels = Channels(clock=clock)
    here, gone = channels.get(HERE), channels.get(GONE)
    for _ in range(2):
        clock.advance(UNUSED_S / 2)
        assert channels.get(HERE) is here
    assert not is_closed(gone)
    clock.advance(1.0)
    assert channels.get(HERE) is here
    await until(lambda: is_closed(gone))
    back = channels.get(GONE)
    assert back is not gone
    assert not is_closed(back)
    assert not is_closed(here)
    await channels.close()


async def test_a_call_in_progress_outlives_that():
    clock, echo = FakeClock(), Echo()
    channels = Channels(clock=clock)
    async with loopback(echo.handler) as (server, _):
        call = channels.get(server.address).unary_unary("/echo/Echo")(b"hello")
        await echo.was_asked.wait()
        clock.advance(UNUSED_S + 1.0)
        channels.get(HERE)
        await asyncio.sleep(0)  # the old one begins to close
        echo.may_answer.set()
        assert await call == b"hello"
    await channels.close()
