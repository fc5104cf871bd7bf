"""Decode workers as seen by the router: one client per life of a worker, made on first use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import grpc

from packlight.core.credentials import Credentials
from packlight.core.types import GenerateEvent, GenerateRequest
from packlight.core.workers import WorkerId, WorkerInfo
from packlight.wire.channel import Dialer
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


@dataclass(frozen=True, slots=True)
class _Connection:
    client: GrpcDecodeClient
    channel: grpc.aio.Channel
    certificate: Credentials | None

    async def close(self) -> None:
        await self.client.close()
        await self.channel.close()


class GrpcDecodeClients:
    """Workers of other processes. Each life of a worker has a connection of its own, so that one which starts again is
    not held back by the failures of the one before. A renewed certificate means a new connection, for it may be asked
    for when the old one has to connect again; the old one goes when its last answer has ended."""

    def __init__(self, dialer: Dialer | None = None) -> None:
        self._dialer = dialer or Dialer()
        self._connections: dict[tuple[WorkerId, int], _Connection] = {}
        self._retired: list[_Connection] = []
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, worker: WorkerInfo) -> DecodeClient:
        life, certificate = (worker.worker_id, worker.generation), self._dialer.certificate
        connection = self._connections.get(life)
        if connection is not None and connection.certificate is not certificate:
            self._retired.append(connection)
            connection = None
        if connection is None:
            channel = self._dialer.open(worker.address)
            connection = _Connection(GrpcDecodeClient(channel, worker.worker_id), channel, certificate)
            self._connections[life] = connection
        self._close_retired()
        return connection.client

    async def forget(self, worker: WorkerInfo) -> None:
        """The worker is off the board. If it was only silent, its answers in progress go on."""
        connection = self._connections.pop((worker.worker_id, worker.generation), None)
        if connection is None:
            return
        if connection.client.is_idle:
            await connection.close()
        else:
            self._retired.append(connection)

    async def close(self) -> None:
        await asyncio.gather(*self._closing)
        for connection in (*self._connections.values(), *self._retired):
            await connection.close()
        self._connections.clear()
        self._retired.clear()

    def _close_retired(self) -> None:
        idle = [connection for connection in self._retired if connection.client.is_idle]
        self._retired = [connection for connection in self._retired if connection not in idle]
        for connection in idle:
            task = asyncio.create_task(connection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
