"""The Decode service on the wire: one stream per router carries all of its requests.

The server turns everything a step produced for one router into one message; the client spreads messages out to the
iterators of their requests. Losing the stream cancels every request on it (server) and fails every request on it with
WorkerLost (client); the next request opens a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol, TypeVar

import grpc

from packlight.core.errors import InternalError, PacklightError, WorkerLost
from packlight.core.types import Failed, GenerateEvent, GenerateRequest, RequestId, is_terminal
from packlight.core.workers import WorkerId
from packlight.wire.events import event_from_proto, event_to_proto
from packlight.wire.requests import generate_from_proto, generate_to_proto
from packlight.wire.status import error_of
from packlight.wire.v1 import decode_pb2

SERVICE = decode_pb2.DESCRIPTOR.services_by_name["Decode"].full_name
Handle = TypeVar("Handle")


class DecodeService(Protocol[Handle]):
    """What the server needs of a decode worker."""

    def submit(self, request: GenerateRequest, sink: Callable[[GenerateEvent], None]) -> Handle: ...
    def cancel(self, task: Handle) -> None: ...


def decode_handler(worker: DecodeService[Handle]) -> grpc.GenericRpcHandler:
    """The service in front of `worker`."""

    # A coroutine that writes, not a generator: see `wire/prefill.py`.
    async def serve(requests: AsyncIterator[decode_pb2.ClientMessage], context: grpc.aio.ServicerContext) -> None:
        connection = RouterConnection(worker)
        reader = asyncio.create_task(connection.read(requests))
        try:
            while (message := await connection.next_message()) is not None:
                await context.write(message)
        finally:
            reader.cancel()
            connection.close()

    method = grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=decode_pb2.ClientMessage.FromString,
        response_serializer=decode_pb2.StepMessage.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Generate": method})


class RouterConnection:
    """One router's stream, on the worker's side: its unfinished requests and the events that wait to be sent."""

    def __init__(self, worker: DecodeService[Handle]) -> None:
        self._worker = worker
        self._handles: dict[RequestId, Handle] = {}
        self._pending: list[decode_pb2.Event] = []
        self._wake = asyncio.Event()
        self._ended = False

    async def read(self, requests: AsyncIterator[decode_pb2.ClientMessage]) -> None:
        """Take in submissions and cancellations until the router closes its side."""
        try:
            async for message in requests:
                if message.WhichOneof("message") == "submit":
                    self._submit(message.submit)
                else:
                    self._cancel(message.cancel.request_id)
        finally:
            self._ended = True
            self._wake.set()

    async def next_message(self) -> decode_pb2.StepMessage | None:
        """Everything that is waiting, as one message; None when the router has gone."""
        while not self._pending and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        events, self._pending = self._pending, []
        return decode_pb2.StepMessage(events=events) if events else None

    def close(self) -> None:
        for request_id in list(self._handles):
            self._cancel(request_id)

    def _submit(self, message: decode_pb2.GenerateRequest) -> None:
        """Whatever is wrong with the request must not cost the others their stream."""
        try:
            handle = self._worker.submit(generate_from_proto(message), self._emit)
        except PacklightError as error:
            self._emit(Failed(message.request_id, error))
        except Exception as error:
            self._emit(Failed(message.request_id, InternalError(f"submitting failed: {error!r}")))
        else:
            self._handles[message.request_id] = handle

    def _cancel(self, request_id: RequestId) -> None:
        handle = self._handles.pop(request_id, None)
        if handle is not None:
            self._worker.cancel(handle)

    def _emit(self, event: GenerateEvent) -> None:
        if is_terminal(event):
            self._handles.pop(event.request_id, None)
        self._pending.append(event_to_proto(event))
        self._wake.set()


class GrpcDecodeClient:
    """A decode worker in another process. Create and use it on one event loop; `close` it in the end."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: WorkerId) -> None:
        self._channel, self._worker_id = channel, worker_id
        self._stream: ClientStream | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """The events of one request, the last one terminal. Closing the iterator cancels it on the worker."""
        stream = self._stream
        if stream is None or stream.lost:
            stream = self._stream = ClientStream(self._channel, self._worker_id)
        events = stream.submit(request)
        try:
            while True:
                event = await events.get()
                yield event
                if is_terminal(event):
                    return
        finally:
            stream.forget(request.request_id)

    @property
    def is_idle(self) -> bool:
        """No request is in progress."""
        return self._stream is None or self._stream.is_idle

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()


class ClientStream:
    """One open `Generate` stream and the requests on it, on the router's side."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: WorkerId) -> None:
        method = channel.stream_stream(
            f"/{SERVICE}/Generate",
            request_serializer=decode_pb2.ClientMessage.SerializeToString,
            response_deserializer=decode_pb2.StepMessage.FromString,
        )
        self._worker_id = worker_id
        self._outgoing: asyncio.Queue[decode_pb2.ClientMessage] = asyncio.Queue()
        self._requests: dict[RequestId, asyncio.Queue[GenerateEvent]] = {}
        self._call = method(self._messages())
        self._reader = asyncio.create_task(self._read())
        self.lost = False

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def submit(self, request: GenerateRequest) -> asyncio.Queue[GenerateEvent]:
        events: asyncio.Queue[GenerateEvent] = asyncio.Queue()
        # First, since it may raise: nobody forgets a request that was never sent.
        message = decode_pb2.ClientMessage(submit=generate_to_proto(request))
        self._requests[request.request_id] = events
        self._outgoing.put_nowait(message)
        return events

    def forget(self, request_id: RequestId) -> None:
        """The caller has what it wants; if that came before the end, the worker is told."""
        if self._requests.pop(request_id, None) is not None and not self.lost:
            cancel = decode_pb2.Cancel(request_id=request_id)
            self._outgoing.put_nowait(decode_pb2.ClientMessage(cancel=cancel))

    async def close(self) -> None:
        self._call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _messages(self) -> AsyncGenerator[decode_pb2.ClientMessage, None]:
        while True:
            yield await self._outgoing.get()

    async def _read(self) -> None:
        error: PacklightError = WorkerLost(f"worker {self._worker_id} closed the stream", worker_id=self._worker_id)
        try:
            async for message in self._call:
                for event in message.events:
                    self._deliver(event_from_proto(event))
        except grpc.aio.AioRpcError as call_error:
            error = error_of(call_error, worker_id=self._worker_id)
        finally:
            self.lost = True
            for request_id in list(self._requests):
                self._deliver(Failed(request_id, error))

    def _deliver(self, event: GenerateEvent) -> None:
        events = self._requests.get(event.request_id)
        if events is None:
            return
        if is_terminal(event):
            del self._requests[event.request_id]
        events.put_nowait(event)
