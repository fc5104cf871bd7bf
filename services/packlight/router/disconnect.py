"""The receiving half of an ASGI connection: the body, and the moment the client goes away.

Knows ASGI messages. `Request.is_disconnected` only tells when asked, so a handler that awaits work would never ask;
here the work races `http.disconnect` instead, whether the answer is a stream or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, or Cancelled as soon as the client is gone. `work` has ended in every case."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise Cancelled("the client went away")
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
