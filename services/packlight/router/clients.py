"""Decode workers as seen by the router: one client per life of a worker, made on first use."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import grpc

from packlight.core.types import GenerateEvent, GenerateRequest, WorkerId, WorkerInfo
from packlight.wire.channel import open_channel
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
    """Workers of other processes. Each life of a worker has a connection of its own, so that one which starts again is
    not held back by the failures of the one before."""

    def __init__(self) -> None:
        self._clients: dict[tuple[WorkerId, int], tuple[GrpcDecodeClient, grpc.aio.Channel]] = {}

    def get(self, worker: WorkerInfo) -> DecodeClient:
        life = (worker.worker_id, worker.generation)
        if life not in self._clients:
            channel = open_channel(worker.address)
            self._clients[life] = (GrpcDecodeClient(channel, worker.worker_id), channel)
        return self._clients[life][0]

    async def forget(self, worker: WorkerInfo) -> None:
        """The worker is off the board. If it was only silent, its answers in progress go on."""
        client, channel = self._clients.pop((worker.worker_id, worker.generation), (None, None))
        if client is not None and channel is not None and client.is_idle:
            await client.close()
            await channel.close()

    async def close(self) -> None:
        for client, channel in self._clients.values():
            await client.close()
            await channel.close()
        self._clients.clear()
