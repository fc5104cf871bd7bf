"""Comments on a stream that is silent: proxies and clients see life, and a dead connection shows.

Knows when a reply last sent something. Does not know what is being waited for.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from packlight.router.sse import Reply


class KeepAlive:
    """While it is entered, the stream of `reply`, once open, is never silent for much longer than `idle_s` seconds.

    One timer for the whole answer, as one for every token is felt; a task for a comment only."""

    def __init__(self, reply: Reply, idle_s: float) -> None:
        self._reply, self._idle_s = reply, idle_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(self._idle_s, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        for pending in (self._timer, self._comment):
            if pending is not None:
                pending.cancel()

    def _look(self) -> None:
        """Comment if it was silent for `idle_s`, and look again when that may next be so."""
        now, due_at = self._loop.time(), self._reply.last_sent_at + self._idle_s
        if due_at <= now:
            due_at = now + self._idle_s
            self._say_something()
        self._timer = self._loop.call_at(due_at, self._look)

    def _say_something(self) -> None:
        if self._reply.is_streaming and (self._comment is None or self._comment.done()):
            self._comment = self._loop.create_task(self._send())

    async def _send(self) -> None:
        with suppress(Exception):  # a client that is gone is noticed where the answer is sent
            await self._reply.keep_alive()
