"""The Prefill service on the wire: a server around a prefill worker, and a client that looks like one.

Both speak events of `core/shipping.py`; bytes are `wire/frames.py`'s. The call's lifetime is the shipment's: the server
ends the worker's iterator when the call ends, the client ends the call when its iterator is closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import grpc

from packlight.core.shipping import PrefillClient, PrefillEvent
from packlight.core.types import PrefillRequest
from packlight.core.workers import WorkerId
from packlight.wire.frames import event_from_bytes, event_to_bytes
from packlight.wire.requests import prefill_from_proto, prefill_to_proto
from packlight.wire.status import abort, error_of
from packlight.wire.trace import trace_from_metadata, trace_to_metadata
from packlight.wire.v1 import prefill_pb2

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name


def prefill_handler(worker: PrefillClient) -> grpc.GenericRpcHandler:
    """The service in front of `worker`."""

    # A coroutine that writes, not a generator: a call that ends while a write waits for room is cancelled *here*, so
    # the worker's iterator is closed at once; a generator would be left to the garbage collector.
    async def serve(data: bytes, context: grpc.aio.ServicerContext) -> None:
        try:
            request = prefill_from_proto(prefill_pb2.PrefillRequest.FromString(data))
            request = replace(request, trace=trace_from_metadata(context.invocation_metadata()))
            async with aclosing(worker.prefill(request)) as events:
                async for event in events:
                    await context.write(event_to_bytes(event))
        except Exception as error:
            await abort(context, error)

    # Identity serialisers: requests and events are bytes already.
    method = grpc.unary_stream_rpc_method_handler(serve)
    return grpc.method_handlers_generic_handler(SERVICE, {"Prefill": method})


class GrpcPrefillClient:
    """A prefill worker in another process."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: WorkerId) -> None:
        self._method, self._worker_id = channel.unary_stream(f"/{SERVICE}/Prefill"), worker_id

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        """Raises what the worker raised, or WorkerLost if it cannot be reached or dies."""
        request = replace(request, transports=tuple(name for name in request.transports if name != "inproc"))
        call = self._method(
            prefill_to_proto(request).SerializeToString(),
            timeout=request.deadline_s,
            metadata=trace_to_metadata(request.trace),
        )
        try:
            async for data in call:
                yield event_from_bytes(data)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, worker_id=self._worker_id) from None
        finally:
            call.cancel()
