"""The way out of a prefill request: from the compute thread to whoever reads the stream.

Knows the order of events: layers in order, the first token before layers that still wait, the end last. Ends exactly
once, with `Shipped` or an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from packlight.core.errors import PacklightError
from packlight.core.rate import Rate
from packlight.core.shipping import Chunk, FirstToken, PrefillEvent, Shipped


class Outbox:
    """Created on the event loop that reads it. `put_threadsafe` may be called anywhere, the rest from that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[PrefillEvent | PacklightError] = deque()
        self._wake = asyncio.Event()
        self.sent = Rate()

    def put_threadsafe(self, events: Iterable[PrefillEvent]) -> None:
        batch = tuple(events)
        self._loop.call_soon_threadsafe(self._put_all, batch)

    def put(self, event: PrefillEvent) -> None:
        self._put_all((event,))

    def fail(self, error: PacklightError) -> None:
        self._events.append(error)
        self._wake.set()

    async def read(self) -> AsyncGenerator[PrefillEvent, None]:
        """The events, until `Shipped`. Raises the error the work failed with."""
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, PacklightError):
                    raise event
                started = time.perf_counter()
                yield event  # comes back when the reader has passed it on: what it takes is the link's pace
                if isinstance(event, Chunk):
                    self.sent.add(len(event.data), time.perf_counter() - started)
                if isinstance(event, Shipped):
                    return
            self._wake.clear()
            await self._wake.wait()

    def _put_all(self, events: tuple[PrefillEvent, ...]) -> None:
        for event in events:
            if isinstance(event, FirstToken):
                self._events.appendleft(event)
            else:
                self._events.append(event)
        self._wake.set()
