"""The way out of a prefill request: from the compute thread to whoever reads the stream.

Knows the order of events: layers in order, the first token before layers that still wait but never before `Accepted`,
the end last. Ends exactly once, with `Shipped` or an error.

A layer is handed over as an iterator of frames, which is drawn here, by the reader: checksums, and the copies that a
transport makes, are not the compute thread's work. Where a transport yields a future, its bytes are still on their way
elsewhere: the layer waits, and the layers behind it, until that is done, or the transport waits no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

from packlight.core.errors import PacklightError
from packlight.core.rate import Rate
from packlight.core.shipping import Accepted, Chunk, FirstToken, LayerHeader, PrefillEvent, ShipFrame, Shipped
from packlight.transfer.base import Pending

LOOK_AGAIN_S = 5.0
"""After so long a layer that is still on its way elsewhere is asked whether it is still waited for."""


@dataclass(slots=True)
class ShipTime:
    """busy_s: passing layers on, from making a frame until the reader wants the next. exposed_s: of that, after the
    prompt was computed; the rest was hidden behind computing. started_s, ended_s: the first and the last of it.
    num_inline, num_beside: layers whose bytes went in the stream, and beside it."""

    busy_s: float = 0.0
    exposed_s: float = 0.0
    started_s: float | None = None
    ended_s: float = 0.0
    num_inline: int = 0
    num_beside: int = 0


class Outbox:
    """Created on the event loop that reads it. `put_threadsafe` may be called anywhere, the rest from that loop."""

    def __init__(self, look_again_s: float = LOOK_AGAIN_S) -> None:
        self._look_again_s = look_again_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Iterator[PrefillEvent | Pending] | PacklightError] = deque()
        self._first_token: FirstToken | None = None
        self._is_accepted = False  # as far as the reader knows
        self._wake = asyncio.Event()
        self._computed_s: float | None = None
        self.sent, self.time = Rate(), ShipTime()
        self.is_complete = False  # whether the reader was given everything
        self.error: PacklightError | None = None  # what the work failed with

    def put_threadsafe(self, events: Iterable[PrefillEvent | Pending]) -> None:
        """`events` are drawn from later, on the event loop."""
        self._loop.call_soon_threadsafe(self._append, iter(events))

    def put(self, event: PrefillEvent) -> None:
        if isinstance(event, FirstToken):
            self._computed_s = time.perf_counter()
            self._first_token = event
            self._wake.set()
        else:
            self._append(iter((event,)))

    def fail(self, error: PacklightError) -> None:
        self.error = error
        self._append(error)

    async def read(self) -> AsyncGenerator[PrefillEvent, None]:
        """The events, until `Shipped`. Raises the error the work failed with."""
        started: float | None = None
        while True:
            started = started or time.perf_counter()
            event = self._draw()
            if event is None or isinstance(event, Future):
                self._wake.clear()
                if event is None:
                    started = None  # nothing to send: the link rests
                    await self._wake.wait()
                else:
                    event.add_done_callback(self._wake_up)
                    with suppress(TimeoutError):  # then it is asked again: it may wait no longer
                        await asyncio.wait_for(self._wake.wait(), self._look_again_s)
                continue
            if isinstance(event, Shipped):
                self.is_complete, event = True, replace(event, ship_s=self.time.busy_s)
            yield event  # comes back when the reader has passed it on: what it takes is the link's pace
            if self.is_complete:
                return
            if isinstance(event, LayerHeader | Chunk):
                self._count(event, started, time.perf_counter())
            started = None

    def _count(self, frame: ShipFrame, started: float, ended: float) -> None:
        self.sent.add(_num_bytes(frame), ended - started)
        self.time.busy_s += ended - started
        if isinstance(frame, LayerHeader):
            self.time.num_inline += frame.offset is None
            self.time.num_beside += frame.offset is not None
        if self.time.started_s is None:
            self.time.started_s = started
        self.time.ended_s = ended
        if self._computed_s is not None:
            self.time.exposed_s += max(0.0, ended - max(started, self._computed_s))

    def _wake_up(self, pending: Pending) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the event loop may be gone by now
            self._loop.call_soon_threadsafe(self._wake.set)

    def _append(self, item: Iterator[PrefillEvent | Pending] | PacklightError) -> None:
        self._waiting.append(item)
        self._wake.set()

    def _draw(self) -> PrefillEvent | Pending | None:
        """The next event, or what it waits for; None if nobody knows yet."""
        while self._waiting or self._first_token is not None:
            if self._first_token is not None and (self._is_accepted or not self._waiting):
                token, self._first_token = self._first_token, None
                return token
            first = self._waiting[0]
            if isinstance(first, PacklightError):
                raise first
            event = next(first, None)
            if event is not None:
                self._is_accepted |= isinstance(event, Accepted)
                return event
            self._waiting.popleft()
        return None


def _num_bytes(frame: ShipFrame) -> int:
    """Of payload that is the receiver's once it has `frame`."""
    if isinstance(frame, LayerHeader):
        return frame.num_bytes if frame.offset is not None else 0
    return len(frame.data)
