"""The scripted server on a real port of this machine, for clients that are processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from tests.support.scripted_openai import ScriptedServer

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@contextmanager
def on_a_port(scripted: ScriptedServer) -> Iterator[str]:
    """Its URL, while a thread serves it."""
    config = uvicorn.Config(_Bridge(scripted), port=0, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True  # some scripts never end
        thread.join(10)
        socket.close()


class _Bridge:
    """ASGI on one side, an httpx transport on the other."""

    def __init__(self, scripted: ScriptedServer) -> None:
        self._scripted = scripted

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            body, is_whole = body + message.get("body", b""), not message.get("more_body", False)
        request = httpx.Request(scope["method"], f"http://scripted{scope['path']}", content=body)
        reply = await self._scripted.handle_async_request(request)
        await send({"type": "http.response.start", "status": reply.status_code, "headers": []})
        assert isinstance(reply.stream, httpx.AsyncByteStream)
        async for piece in reply.stream:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
