"""Decode workers as seen by the router: one client per life of a worker, made on first use."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from packlight.core.types import GenerateEvent, GenerateRequest, WorkerId, WorkerInfo
from packlight.wire.channel import Channels
from packlight.wire.decode import GrpcDecodeClient


class DecodeClient(Protocol):
    """Closing the generator cancels the request on the worker."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]: ...


class DecodeClients(Protocol):
    def get(self, worker: WorkerInfo) -> DecodeClient: ...


class LocalDecodeClients:
    """Workers of this process."""

    def __init__(self, clients: dict[WorkerId, DecodeClient]) -> None:
        self._clients = clients

    def get(self, worker: WorkerInfo) -> DecodeClient:
        return self._clients[worker.worker_id]


class GrpcDecodeClients:
    """Workers of other processes, by address."""

    def __init__(self) -> None:
        self._channels = Channels()
        self._clients: dict[str, GrpcDecodeClient] = {}

    def get(self, worker: WorkerInfo) -> DecodeClient:
        if worker.address not in self._clients:
            channel = self._channels.get(worker.address)
            self._clients[worker.address] = GrpcDecodeClient(channel, worker.worker_id)
        return self._clients[worker.address]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        await self._channels.close()
