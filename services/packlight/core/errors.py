"""Every error a caller can meet, as one tree.

    PacklightError
    ├── RequestError                    the caller must change the request; never retried
    │   ├── InvalidRequest              400  a field is missing, mistyped or out of range
    │   ├── ContextLengthExceeded       400  prompt + max_tokens is longer than the model's window
    │   ├── RequestNeverFits            400  the KV it needs is larger than the whole pool
    │   ├── Unauthorized                401
    │   └── NotFound                    404  unknown path; ModelNotFound: unknown model
    ├── CapacityError                   try again later
    │   ├── QueueFull                   429  a bounded queue is full (Retry-After says when)
    │   ├── NoWorker                    503  no live worker can take the request
    │   └── Draining                    503  this process is shutting down
    ├── WorkerError                     something behind the router failed; may succeed elsewhere
    │   ├── WorkerLost                  503  the worker died, froze or dropped the connection
    │   ├── ShipmentCorrupt             502  a checksum or a length of a KV shipment is wrong
    │   └── ShipmentIncompatible        502  the two ends disagree on model, layout, dtype or wire version
    ├── DeadlineExceeded                504
    ├── Cancelled                       499  the client went away; never shown to anybody, only counted
    ├── InternalError                   500  a bug of ours
    └── StartupError                    the process cannot start; the CLI prints it and exits
        ├── ConfigError                 a flag or a file is wrong
        └── ModelError                  a model cannot be found, read or served

Each class carries its HTTP status, its gRPC code, the OpenAI error `type` and `code`, and whether another worker may
succeed where this one failed. Errors cross process boundaries as (class name, message, fields): see `wire/status.py`.
"""

from __future__ import annotations

from typing import ClassVar


class PacklightError(Exception):
    """Base of every error that is reported to a caller.

    `param` names the request field at fault (`messages[2].content`). `retry_after_s` is a hint for overload errors.
    `worker_id` names the worker at fault, so that a retry can avoid it.
    """

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    openai_type: ClassVar[str] = "server_error"
    openai_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        worker_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.openai_code
        self.retry_after_s = retry_after_s
        self.worker_id = worker_id


class RequestError(PacklightError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"
    openai_code = "invalid_value"


class InvalidRequest(RequestError):
    pass


class ContextLengthExceeded(RequestError):
    openai_code = "context_length_exceeded"


class RequestNeverFits(RequestError):
    openai_code = "kv_never_fits"


class Unauthorized(RequestError):
    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    openai_code = "invalid_api_key"


class NotFound(RequestError):
    http_status = 404
    grpc_code = "NOT_FOUND"
    openai_code = "not_found"


class ModelNotFound(NotFound):
    openai_code = "model_not_found"


class CapacityError(PacklightError):
    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"
    openai_type = "server_error"
    openai_code = "engine_overloaded"


class QueueFull(CapacityError):
    http_status = 429
    openai_type = "rate_limit_error"
    openai_code = "rate_limit_exceeded"
    retryable = True


class NoWorker(CapacityError):
    grpc_code = "UNAVAILABLE"
    openai_code = "no_capacity"


class Draining(CapacityError):
    grpc_code = "UNAVAILABLE"
    openai_code = "draining"
    retryable = True


class WorkerError(PacklightError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    openai_code = "worker_failed"
    retryable = True


class WorkerLost(WorkerError):
    openai_code = "worker_lost"


class DeviceLost(WorkerError):
    """The worker computes nothing any more, and ends."""

    openai_code = "worker_lost"


class ShipmentCorrupt(WorkerError):
    http_status = 502
    grpc_code = "DATA_LOSS"
    openai_code = "shipment_corrupt"


class ShipmentIncompatible(WorkerError):
    http_status = 502
    grpc_code = "FAILED_PRECONDITION"
    openai_code = "shipment_incompatible"


class DeadlineExceeded(PacklightError):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    openai_code = "timeout"


class Cancelled(PacklightError):
    http_status = 499
    grpc_code = "CANCELLED"
    openai_code = "cancelled"


class InternalError(PacklightError):
    pass


class StartupError(PacklightError):
    grpc_code = "FAILED_PRECONDITION"
    openai_code = "startup_failed"


class ConfigError(StartupError):
    pass


class ModelError(StartupError):
    pass


def error_classes() -> dict[str, type[PacklightError]]:
    """Every class of the tree by name: how an error is found again after it crossed a process boundary."""
    found: dict[str, type[PacklightError]] = {}
    todo = [PacklightError]
    while todo:
        cls = todo.pop()
        found[cls.__name__] = cls
        todo.extend(cls.__subclasses__())
    return found
