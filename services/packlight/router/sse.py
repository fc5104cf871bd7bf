"""One HTTP reply: a JSON body, or server-sent events (WHATWG HTML, section 9.2).

Knows ASGI's send side and whether anything has been sent. Does not know what the JSON means. A stream that fails ends
with an `error` event and without `[DONE]`, so that no client can take it for a complete answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Send

from packlight.core.errors import Cancelled
from packlight.router.errors import Problem

_STREAM_HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Tells nginx not to buffer.
    "x-accel-buffering": "no",
}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# A reader that is stuck does not get to see why its stream ends.
_FAREWELL_S = 1.0


class Reply:
    """Everything that one request is answered with. Nothing is sent before `send_json` or `open_stream`.

    `last_sent_at` is by the event loop's clock."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()
        self.is_streaming = False
        self.is_complete = False
        self.last_sent_at = 0.0
        self.status: int | None = None

    async def send_json(
        self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = _encode(body)
        fixed = {"content-type": "application/json", "content-length": str(len(data))}
        await self._start(status, {**fixed, **(headers or {})})
        await self._send_part(data, more=False)

    async def open_stream(self, headers: Mapping[str, str]) -> None:
        self.is_streaming = True
        await self._start(200, {**_STREAM_HEADERS, **headers})

    async def send_events(self, bodies: Iterable[Mapping[str, Any]]) -> None:
        if data := b"".join(b"data: " + _encode(body) + b"\n\n" for body in bodies):
            await self._send_part(data)

    async def keep_alive(self) -> None:
        """A comment: clients skip it, proxies see life, and a dead connection shows."""
        await self._send_part(b": keep-alive\n\n")

    async def close_stream(self) -> None:
        await self._send_part(b"data: [DONE]\n\n", more=False)

    async def fail(self, problem: Problem) -> None:
        """Report `problem` in the way that is still open. Nobody is left to report a cancellation to."""
        if problem.status == Cancelled.http_status:
            return
        if not self.is_streaming:
            if self.status is None:
                await self.send_json(problem.body(), problem.status, problem.headers())
            return
        async with asyncio.timeout(_FAREWELL_S):
            await self._send_part(b"data: " + _encode(problem.body()) + b"\n\n", more=False)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": Headers(headers).raw})

    async def _send_part(self, data: bytes, *, more: bool = True) -> None:
        async with self._lock:  # a comment does not get between the parts of an answer and its end
            self.is_complete, self.last_sent_at = not more, asyncio.get_running_loop().time()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _encode(body: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(body).encode()
