"""An OpenAI-compatible server that is all script, and time in which waiting for it takes none.

It stands behind an httpx transport, so the client under test is the real one down to its HTTP library, and it answers
at the seconds its script says: to the microsecond in virtual time, about so in real time.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import httpx


@dataclass
class Script:
    """`first_s` until the first event, `gap_s` between events, `end_s` until the one with the finish reason. An answer
    has as many tokens as were asked for, `tokens_per_event` in each event, the last `num_silent` without any.
    `status`, `error_after` (events) and `cut_after` make it fail. `before` is called first, with the request's body;
    what it changes holds from this answer on, and not for those under way."""

    first_s: float = 0.5
    gap_s: float = 0.1
    end_s: float = 0.0
    tokens_per_event: int = 1
    num_silent: int = 0
    word: str = "word "
    has_usage: bool = True
    kv: dict[str, Any] | None = None
    status: int = 200
    error_after: int | None = None
    cut_after: int | None = None
    before: Callable[[dict[str, Any]], None] = lambda body: None


@dataclass
class ScriptedServer(httpx.AsyncBaseTransport):
    """`bodies` are the requests so far; `num_running` those being answered, `most_running` at most."""

    script: Script
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "scripted"}]})
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f'# TYPE pages gauge\npages{{state="held"}} {7.0 * self.num_running}\n')
        body = json.loads(request.content)
        self.bodies.append(body)
        self.script.before(body)
        if self.script.status != 200:
            return httpx.Response(self.script.status, json={"error": {"message": "no room"}})
        return httpx.Response(200, stream=_Stream(self._pieces(body, replace(self.script))))

    async def _pieces(self, body: dict[str, Any], script: Script) -> AsyncIterator[bytes]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async for event in self._events(body, script):
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
        finally:
            self.num_running -= 1

    async def _events(self, body: dict[str, Any], script: Script) -> AsyncIterator[dict[str, Any] | str]:
        num_tokens = body["max_tokens"]
        if "messages" in body:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        for index in range((num_tokens - script.num_silent) // script.tokens_per_event):
            await asyncio.sleep(script.first_s if index == 0 else script.gap_s)
            if index == script.error_after:
                yield {"error": {"message": "worker lost"}}
            if index == script.cut_after:
                return
            yield {"choices": [_choice(body, script.word * script.tokens_per_event)]}
        await asyncio.sleep(script.end_s)
        yield {"choices": [_choice(body, "") | {"finish_reason": "length"}]}
        if script.has_usage:
            yield {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": num_tokens, "kv": script.kv}}
        yield "[DONE]"


def _choice(body: dict[str, Any], text: str) -> dict[str, Any]:
    return {"index": 0, **({"delta": {"content": text}} if "messages" in body else {"text": text})}


class _Stream(httpx.AsyncByteStream):
    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            yield piece


class _Instant(selectors.DefaultSelector):
    """Waiting moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now


def run_in_virtual_time(main: Coroutine[Any, Any, Any]) -> Any:
    """Like `asyncio.run`, but sleeping takes no time: the loop's clock jumps to when the next sleeper wakes."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main)


def virtual_clock() -> float:
    """Seconds on the running loop's clock."""
    return asyncio.get_running_loop().time()
