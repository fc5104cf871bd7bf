"""Clients and processes for tests that cross a process boundary: gRPC on loopback, workers, whole clusters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from packlight.wire.channel import Channels, start_server


@dataclass
class LoopbackServer:
    """A gRPC server of this process that can be ended and started again on the same port."""

    handler: grpc.GenericRpcHandler
    server: grpc.aio.Server
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """At once: what is in progress ends as if the process had gone."""
        await self.server.stop(None)

    async def start_again(self) -> None:
        self.server, _ = await start_server([self.handler], "127.0.0.1", self.port)


@asynccontextmanager
async def loopback(handler: grpc.GenericRpcHandler) -> AsyncIterator[tuple[LoopbackServer, grpc.aio.Channel]]:
    """A server around `handler`, and a channel to it, both as the processes make them."""
    server, port = await start_server([handler], "127.0.0.1", 0)
    loopback_server, channels = LoopbackServer(handler, server, port), Channels()
    try:
        yield loopback_server, channels.get(loopback_server.address)
    finally:
        await channels.close()
        await loopback_server.stop()
        await asyncio.sleep(0)
