"""The receiving half of an ASGI connection: the body, and the moment the client goes away.

Knows ASGI messages. `Request.is_disconnected` only tells when asked, so a handler that awaits work would never ask;
here the work races `http.disconnect` instead, whether the answer is a stream or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from packlight.core.errors import Cancelled

T = TypeVar("T")

_BODY_TIMEOUT_S = 30.0
# The rest of a refused body is not worth receiving.
_CLOSE = {"connection": "close"}


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The body, if it is JSON, small enough and quick enough: HTTPException 415, 413 or 408 otherwise. A browser cannot
    send this media type to another origin unasked, so a web page cannot make a visitor's server work."""
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, headers=_CLOSE)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await _collect(receive, max_bytes)
    except TimeoutError:
        raise HTTPException(408, headers=_CLOSE) from None


async def _collect(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away before its request was complete")
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The request body is larger than {max_bytes} bytes, the most accepted.", headers=_CLOSE)


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive, is_answered: Callable[[], bool]) -> T:
    """The result of `work`, or Cancelled as soon as the client is gone before it has all of its answer. `work` has
    ended in every case."""
    try:
        async with asyncio.timeout(None) as presence:
            watcher = asyncio.create_task(_end_on_disconnect(presence, receive, is_answered))
            try:
                return await work
            finally:
                watcher.cancel()
    except TimeoutError:
        if not presence.expired():
            raise
        raise Cancelled("the client went away") from None


async def _end_on_disconnect(presence: asyncio.Timeout, receive: Receive, is_answered: Callable[[], bool]) -> None:
    """Expires `presence` when the client is gone. One that cannot be heard any more is gone, too."""
    with suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
    if not is_answered():
        presence.reschedule(0.0)
