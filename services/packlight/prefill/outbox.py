"""The way out of a prefill request: from the compute thread to whoever reads the stream.

Knows the order of events: layers in order, the first token before layers that still wait, the end last. Ends exactly
once, with `Shipped` or an error.

A layer is handed over as an iterator of frames, which is drawn here, by the reader: checksums, and the copies that a
transport makes, are not the compute thread's work.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass

from packlight.core.errors import PacklightError
from packlight.core.rate import Rate
from packlight.core.shipping import Chunk, FirstToken, LayerHeader, PrefillEvent, ShipFrame, Shipped


@dataclass(slots=True)
class ShipTime:
    """busy_s: passing layers on, from making a frame until the reader wants the next. exposed_s: of that, after the
    prompt was computed; the rest was hidden behind computing."""

    busy_s: float = 0.0
    exposed_s: float = 0.0


class Outbox:
    """Created on the event loop that reads it. `put_threadsafe` may be called anywhere, the rest from that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Iterator[PrefillEvent] | PacklightError] = deque()
        self._wake = asyncio.Event()
        self._computed_s: float | None = None
        self.sent, self.time = Rate(), ShipTime()
        self.is_complete = False  # whether the reader was given everything

    def put_threadsafe(self, events: Iterable[PrefillEvent]) -> None:
        """`events` are drawn from later, on the event loop."""
        self._loop.call_soon_threadsafe(self._append, iter(events))

    def put(self, event: PrefillEvent) -> None:
        if isinstance(event, FirstToken):
            self._computed_s = time.perf_counter()
            self._waiting.appendleft(iter((event,)))
            self._wake.set()
        else:
            self._append(iter((event,)))

    def fail(self, error: PacklightError) -> None:
        self._append(error)

    async def read(self) -> AsyncGenerator[PrefillEvent, None]:
        """The events, until `Shipped`. Raises the error the work failed with."""
        while True:
            started = time.perf_counter()
            event = self._draw()
            if event is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self.is_complete = isinstance(event, Shipped)
            yield event  # comes back when the reader has passed it on: what it takes is the link's pace
            if self.is_complete:
                return
            if isinstance(event, LayerHeader | Chunk):
                self._count(event, started, time.perf_counter())

    def _count(self, frame: ShipFrame, started: float, ended: float) -> None:
        self.sent.add(_num_bytes(frame), ended - started)
        self.time.busy_s += ended - started
        if self._computed_s is not None:
            self.time.exposed_s += max(0.0, ended - max(started, self._computed_s))

    def _append(self, item: Iterator[PrefillEvent] | PacklightError) -> None:
        self._waiting.append(item)
        self._wake.set()

    def _draw(self) -> PrefillEvent | None:
        """The next event, None if there is none yet."""
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, PacklightError):
                raise first
            event = next(first, None)
            if event is not None:
                return event
            self._waiting.popleft()
        return None


def _num_bytes(frame: ShipFrame) -> int:
    """Of payload that is the receiver's once it has `frame`."""
    if isinstance(frame, LayerHeader):
        return frame.num_bytes if frame.offset is not None else 0
    return len(frame.data)
