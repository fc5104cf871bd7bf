"""Errors across gRPC: our tree on one side, status codes and trailing metadata on the other.

A PacklightError travels whole, serialised in the trailing metadata `packlight-error-bin`; the status code is for
proxies and other clients. A failure that carries none of ours (the peer died, froze, or never was) is a WorkerLost.
"""

from __future__ import annotations

import grpc

from packlight.core.errors import Cancelled, DeadlineExceeded, InternalError, PacklightError, WorkerLost
from packlight.wire.events import error_from_proto, error_to_proto
from packlight.wire.v1 import common_pb2

ERROR_KEY = "packlight-error-bin"
MAX_MESSAGE_CHARS = 1000  # the message travels twice, and gRPC drops a call whose metadata exceeds 16 KiB


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with `error`. Does not return."""
    known = error if isinstance(error, PacklightError) else InternalError(f"unexpected {error!r}")
    whole = error_to_proto(known)
    whole.message = whole.message[:MAX_MESSAGE_CHARS]
    await context.abort(grpc.StatusCode[known.grpc_code], whole.message, ((ERROR_KEY, whole.SerializeToString()),))


def error_of(call_error: grpc.aio.AioRpcError, *, worker_id: str) -> PacklightError:
    """What a failed call means to its caller."""
    for key, value in call_error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            return error_from_proto(common_pb2.Error.FromString(value))
    code, details = call_error.code(), call_error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"worker {worker_id} did not finish in time", worker_id=worker_id)
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(f"the call to worker {worker_id} was cancelled", worker_id=worker_id)
    return WorkerLost(f"worker {worker_id} is unreachable: {code.name} {details}", worker_id=worker_id)
