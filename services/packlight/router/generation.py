"""All choices of one HTTP request, generated side by side and merged into one sequence of deltas.

Knows the backend's events and tasks. Does not know JSON or HTTP. Leaving the context closes every backend generator
that is still open, which is what cancels the work behind it.

Nearly every request asks for one choice, and its events are read where they are needed: a task between would cost
two switches for every token. Several choices have a task each, which fill one queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Self

from packlight.core.errors import InternalError
from packlight.core.types import Failed, Finished, Progress, Tokens
from packlight.router.choice import Choice, Delta
from packlight.router.service import Backend, BackendEvent, Decided

Events = AsyncGenerator[BackendEvent, None]

# Deltas waiting for a slow reader, per choice. A full queue stops the backend's stream by flow control.
_QUEUED_DELTAS = 16


class Generation:
    """`async with Generation(...) as generation: async for delta in generation.deltas(): ...`"""

    def __init__(self, backend: Backend, choices: Sequence[Choice], clock: Callable[[], float]) -> None:
        self._backend = backend
        self._choices = choices
        self._clock = clock
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue(_QUEUED_DELTAS * len(choices))
        self._only: Events | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._left = False

    async def __aenter__(self) -> Self:
        if len(self._choices) == 1:
            self._only = self._events(self._choices[0])
        else:
            self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self._choices]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        if self._only is not None:
            with suppress(Exception):
                await self._only.aclose()
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def deltas(self) -> AsyncIterator[Delta]:
        """The deltas of all choices as they come, until every choice has its finish reason. Raises what the backend
        raised, or the error of its `Failed` event."""
        return self._merged() if self._only is None else self._folded(self._choices[0], self._only)

    def _events(self, choice: Choice) -> Events:
        return self._backend.generate(choice.request, choice.plan)

    async def _merged(self) -> AsyncIterator[Delta]:
        num_unfinished = len(self._choices)
        while num_unfinished:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            num_unfinished -= item.finish_reason is not None
            yield item

    async def _pump(self, choice: Choice) -> None:
        try:
            async with aclosing(self._events(choice)) as events:
                async for delta in self._folded(choice, events):
                    await self._queue.put(delta)
        except Exception as error:
            if not self._left:
                await self._queue.put(error)

    async def _folded(self, choice: Choice, events: Events) -> AsyncIterator[Delta]:
        """What `events` add to the choice, up to its finish reason."""
        async for event in events:
            delta = self._fold(choice, event)
            if delta is not None:
                yield delta
            if choice.finish_reason is not None:
                return
        raise InternalError("the backend ended an answer without Finished or Failed")

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
