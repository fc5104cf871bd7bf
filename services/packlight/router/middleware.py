"""What every reply carries: a request id, the processing time; and a last net for bugs.

Pure ASGI: Starlette's `BaseHTTPMiddleware` hides disconnects. Everything is decided on `scope["path"]` and headers as
they came; the `Host` header, which Starlette builds URLs from, is never looked at (CVE-2026-48746 was such a URL).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packlight.router.errors import log_problem, problem_of
from packlight.router.sse import Reply

_API_VERSION = "2020-10-01"
_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestIdMiddleware:
    """Gives each request an id: the client's `x-request-id` when it is safe to repeat and log, else a new one."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = self._clock()
        request_id = _inbound_id(scope) or f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["x-request-id"] = request_id
                headers["openai-version"] = _API_VERSION
                headers["openai-processing-ms"] = str(round(1000 * (self._clock() - started_at)))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            problem = problem_of(error)
            log_problem(problem, error, request_id)
            if started:
                raise
            await Reply(send_with_id).fail(problem)


def request_id_of(scope: Scope) -> str:
    request_id: str = scope["state"]["request_id"]
    return request_id


def _inbound_id(scope: Scope) -> str | None:
    value = Headers(scope=scope).get("x-request-id", "")
    return value if _SAFE_ID.fullmatch(value) else None
