"""Errors as OpenAI's clients expect them: status, body, headers.

Knows HTTP and the shape `{"error": {"message", "type", "param", "code"}}`. Does not decide what is an error.
Messages written for the caller (a bad request, overload, a deadline) are shown; what failed inside is logged and
replaced by a general sentence, so that no address, path or exception text leaks. Nothing the client sent is repeated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from packlight.core.errors import Cancelled, CapacityError, DeadlineExceeded, PacklightError, RequestError, WorkerError
from packlight.core.trace import TraceContext
from packlight.telemetry.logs import log_event

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1000
_DEFAULT_RETRY_AFTER_S = 1.0
# Trying again helps: the server is full, starting, stopping, or lost a worker. After a deadline or a bug it does not.
_TRY_AGAIN = frozenset({408, 429, 502, 503})
_SHOWN = (RequestError, CapacityError, DeadlineExceeded, Cancelled)
_WORKER_FAILED = "A worker failed while it served this request. Please try again."
_OUR_BUG = "The server had an error while it processed this request."

_HTTP_PROBLEMS: Mapping[int, tuple[str, str]] = {
    404: ("not_found", "Unknown path. This server answers /v1/chat/completions, /v1/completions and /v1/models."),
    405: ("method_not_allowed", "This path does not answer this method; the Allow header lists those it does."),
    408: ("request_timeout", "The request body did not arrive in time."),
    413: ("request_too_large", "The request body is too large."),
    415: ("unsupported_media_type", "Send the body as JSON, with the header 'Content-Type: application/json'."),
}


class Outcome(StrEnum):
    """How a request ended; each ends in exactly one way."""

    COMPLETED = "completed"
    INVALID = "invalid"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    FAILED = "failed"


_OUTCOMES: Mapping[type[PacklightError], Outcome] = {
    RequestError: Outcome.INVALID,
    CapacityError: Outcome.REFUSED,
    Cancelled: Outcome.CANCELLED,
    DeadlineExceeded: Outcome.TIMEOUT,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error, ready to be sent. `kind` is its class name, for logs and metrics."""

    kind: str
    outcome: Outcome
    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        message = self.message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What the OpenAI clients obey: whether to try again, and when."""
        headers = {"x-should-retry": "true" if self.status in _TRY_AGAIN else "false", **self.extra_headers}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (429, 503):
            delay_s = _DEFAULT_RETRY_AFTER_S if self.retry_after_s is None else max(self.retry_after_s, 0.0)
            headers["retry-after"] = str(math.ceil(delay_s))
            headers["retry-after-ms"] = str(math.ceil(delay_s * 1000))
        return headers


def problem_of(error: Exception) -> Problem:
    """How `error` is reported. Anything that is not an error of ours or of HTTP is a bug: 500, without details."""
    if isinstance(error, PacklightError):
        return _packlight_problem(error)
    if isinstance(error, HTTPException):
        return _http_problem(error)
    return Problem(type(error).__name__, Outcome.FAILED, 500, "server_error", "internal_error", _OUR_BUG)


def log_problem(
    problem: Problem, error: Exception, request_id: str, answer_id: str = "-", trace: TraceContext | None = None
) -> None:
    """Say what the client is not told. A bug is logged with its traceback, a failed worker with its message."""
    if problem.outcome is Outcome.FAILED:
        is_bug = not isinstance(error, WorkerError)
        log_event(
            _log,
            logging.ERROR,
            "request failed",
            exc_info=error if is_bug else None,
            trace=trace,
            request=request_id,
            answer=answer_id,
            error=problem.kind,
            reason=error,
        )


async def answer_problem(_: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app."""
    problem = problem_of(error)
    return JSONResponse(problem.body(), problem.status, problem.headers())


def _packlight_problem(error: PacklightError) -> Problem:
    if isinstance(error, _SHOWN):
        message = error.message
    else:
        message = _WORKER_FAILED if isinstance(error, WorkerError) else _OUR_BUG
    return Problem(
        kind=type(error).__name__,
        outcome=_outcome_of(error),
        status=error.http_status,
        type=error.openai_type,
        code=error.code,
        message=message,
        param=error.param,
        retry_after_s=error.retry_after_s,
    )


def _outcome_of(error: PacklightError) -> Outcome:
    for cls, outcome in _OUTCOMES.items():
        if isinstance(error, cls):
            return outcome
    return Outcome.FAILED


def _http_problem(error: HTTPException) -> Problem:
    code, message = _HTTP_PROBLEMS.get(error.status_code, ("http_error", error.detail))
    is_detailed = error.detail != HTTPStatus(error.status_code).phrase
    return Problem(
        kind=f"HTTP{error.status_code}",
        outcome=Outcome.INVALID if error.status_code < 500 else Outcome.FAILED,
        status=error.status_code,
        type="invalid_request_error" if error.status_code < 500 else "server_error",
        code=code,
        message=error.detail if is_detailed else message,
        extra_headers=dict(error.headers or {}),
    )
