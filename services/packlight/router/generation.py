"""All choices of one HTTP request, generated side by side and merged into one sequence of deltas.

Knows the backend's events and tasks. Does not know JSON or HTTP. Leaving the context closes every backend generator
that is still open, which is what cancels the work behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Self

from packlight.core.errors import InternalError
from packlight.core.types import Failed, Finished, Progress, Tokens
from packlight.router.choice import Choice, Delta
from packlight.router.service import Backend, BackendEvent, Decided

# Deltas waiting for a slow reader, per choice. A full queue stops the backend's stream by flow control.
_QUEUED_DELTAS = 16


class Generation:
    """`async with Generation(...) as generation: async for delta in generation.deltas(): ...`"""

    def __init__(self, backend: Backend, choices: Sequence[Choice], clock: Callable[[], float]) -> None:
        self._backend = backend
        self._choices = choices
        self._clock = clock
        self._queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_QUEUED_DELTAS * len(choices))
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._ticker: asyncio.TimerHandle | None = None
        self._last_delta_at = 0.0
        self._left = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self._choices]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[Delta | None]:
        """The deltas of all choices as they come, until every choice has its finish reason; None after each `idle_s`
        seconds without one. Raises what the backend raised, or the error of its `Failed` event."""
        num_unfinished = len(self._choices)
        if idle_s is not None:
            self._last_delta_at = self._loop.time()
            self._tick(idle_s)
        while num_unfinished:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            self._last_delta_at = self._loop.time()
            num_unfinished -= item is not None and item.finish_reason is not None
            yield item

    def _tick(self, idle_s: float) -> None:
        """Say None if it was silent for `idle_s`, and look again when that may next be so. One timer for the whole
        answer, as one for every token is felt."""
        due_at = self._last_delta_at + idle_s
        if due_at <= self._loop.time():
            if self._queue.empty():
                self._queue.put_nowait(None)
            due_at = self._loop.time() + idle_s
        self._ticker = self._loop.call_at(due_at, self._tick, idle_s)

    async def _pump(self, choice: Choice) -> None:
        try:
            async with aclosing(self._backend.generate(choice.request, choice.plan)) as events:
                async for event in events:
                    delta = self._fold(choice, event)
                    if delta is not None:
                        await self._queue.put(delta)
                    if choice.finish_reason is not None:
                        return
            raise InternalError("the backend ended an answer without Finished or Failed")
        except Exception as error:
            if not self._left:
                await self._queue.put(error)

    def _fold(self, choice: Choice, event: BackendEvent) -> Delta | None:
        match event:
            case Decided(decision=decision):
                choice.packing = decision
                return None
            case Progress(usage=usage):
                choice.usage = usage
                return None
            case Tokens(tokens=tokens):
                return choice.push(tokens, self._clock())
            case Finished():
                return choice.finish(event)
            case Failed(error=error):
                raise error
