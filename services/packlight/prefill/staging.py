"""The way of packed layers from a GPU's memory to the host's, where a transport takes them from there.

The compute thread only says that a layer is to come: the copy starts on a stream of its own when the layer is packed,
goes to pinned memory, and is waited for on a thread of its own. Until then the layer's frames are pending, and none of
its bytes is looked at.

Pinned memory is bounded. A layer that finds no room waits where it is; but each shipment may have two layers staged
whatever the others hold - one that is read until the next has come, and the next - so that a reader that stalls delays
nobody else. Which memory is free is not decided here: it comes back when its last reader has forgotten it
(`kv/lending.py`).

Knows payloads and senders. What a copy is comes in as a `Copier`.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from packlight.core.errors import InternalError
from packlight.core.shipping import ShipFrame
from packlight.kv.lending import Bytes, Lending
from packlight.kv.side_stream import CudaSideStream
from packlight.transfer.base import KVSender, Pending
from packlight.transfer.links import now_on

LIMIT_BYTES = 512 << 20
"""Of pinned memory: four layers of full KV of an 8B model at 32k tokens."""
ALWAYS = 2  # layers of a shipment that may be staged without room
JOIN_S = 5.0

Frames = Iterator[ShipFrame | Pending]


class Copying(Protocol):
    """A copy under way."""

    def synchronize(self) -> None:
        """Wait until its bytes are there. Raises RuntimeError if they will not be."""
        ...


class Copier(Protocol):
    """Copies out of one device's memory."""

    def allocate(self, num_bytes: int) -> Bytes:
        """Host memory that it copies to."""
        ...

    def now(self, payload: Tensor) -> Any:
        """The moment, on the calling thread, from which `payload` is what it is to be: a name for it."""
        ...

    def start(self, host: Tensor, payload: Tensor, made: Any) -> Copying:
        """Copy once `made` has come, without waiting for it. Both tensors stay as they are until the copy is done."""
        ...


class CudaCopier:
    """Beside what the GPU computes: on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = CudaSideStream(device)

    def allocate(self, num_bytes: int) -> Bytes:
        return self._stream.allocate(num_bytes)

    def now(self, payload: Tensor) -> Any:
        return now_on(payload)

    def start(self, host: Tensor, payload: Tensor, made: Any) -> Copying:
        return self._stream.run(partial(host.copy_, payload, non_blocking=True), after=made)


@dataclass(eq=False, slots=True)
class _Layer:
    """A layer on its way. `frames` are there when its bytes are."""

    sender: KVSender
    number: int
    lengths: tuple[int, ...]
    payload: Tensor
    made: Any
    frames: Future[Frames] = field(default_factory=Future)


class _UnderWay(NamedTuple):
    layer: _Layer
    host: Tensor
    copying: Copying


@dataclass(frozen=True, eq=False, slots=True)
class _CameBack:
    """Memory that a layer of `sender` was staged in."""

    sender: KVSender


class Staging:
    """One per worker. `frames` is called on the compute thread; the rest happens on two threads of its own, from the
    first layer until `close`: one starts copies, the other waits for them, in order."""

    def __init__(self, copier: Copier, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._copier, self._memory = copier, Lending(limit_bytes, copier.allocate)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        # A SimpleQueue, because destructors put into it.
        self._news: queue.SimpleQueue[_Layer | _CameBack | None] = queue.SimpleQueue()
        self._under_way: queue.SimpleQueue[_UnderWay | None] = queue.SimpleQueue()
        self._waiting: deque[_Layer] = deque()
        self._num_staged: Counter[KVSender] = Counter()

    def frames(self, sender: KVSender, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Frames:
        """`sender.frames` of a copy of `payload` on the host. The copy begins now, not when the frames are drawn; they
        raise InternalError if it fails. `payload` must not change any more."""
        staged = _Layer(sender, layer, lengths, payload, self._copier.now(payload))
        with self._lock:
            if self._is_closed:
                staged.frames.set_exception(RuntimeError("the worker ends"))
            else:
                self._start_threads()
                self._news.put(staged)
        return _drawn(layer, staged.frames)

    def close(self) -> None:
        """Layers that are not on the host yet will not be."""
        with self._lock:
            self._is_closed = True
            self._news.put(None)
        for thread in self._threads:
            thread.join(timeout=JOIN_S)

    def _start_threads(self) -> None:
        if not self._threads:
            for run in (self._start_all, self._finish_all):
                self._threads.append(threading.Thread(target=run, name="packlight-staging", daemon=True))
                self._threads[-1].start()

    # ── on the thread that starts copies ─────────────────────────────────────────────────────────────────────────

    def _start_all(self) -> None:
        """Whatever happens, every layer ends: with frames or with an error."""
        while self._hear():
            while (layer := self._next()) is not None:
                self._start(layer)
        self._under_way.put(None)
        for layer in self._waiting:
            layer.frames.set_exception(RuntimeError("the worker ends"))

    def _hear(self) -> bool:
        """Wait for something new. False when it was the last."""
        news = self._news.get()
        if isinstance(news, _Layer):
            self._waiting.append(news)
        elif news is not None:
            self._num_staged[news.sender] -= 1
            self._num_staged = +self._num_staged
        return news is not None

    def _next(self) -> _Layer | None:
        """The first that may start, no layer before those of its shipment that came earlier."""
        passed: set[KVSender] = set()
        for layer in self._waiting:
            is_due = self._num_staged[layer.sender] < ALWAYS and layer.sender not in passed
            if is_due or (not passed and self._memory.has_room(layer.payload.numel())):
                return layer
            passed.add(layer.sender)
        return None

    def _start(self, layer: _Layer) -> None:
        self._waiting.remove(layer)
        try:
            host = self._memory.lend(layer.payload.numel(), partial(self._news.put, _CameBack(layer.sender)))
            self._num_staged[layer.sender] += 1
            self._under_way.put(_UnderWay(layer, host, self._copier.start(host, layer.payload, layer.made)))
        except Exception as error:  # a GPU's errors are of many classes
            layer.frames.set_exception(error)

    # ── on the thread that waits for copies ──────────────────────────────────────────────────────────────────────

    def _finish_all(self) -> None:
        while self._finish_next():
            pass

    def _finish_next(self) -> bool:
        """A function of its own: what it held is let go when it returns, and not when there is something new."""
        under_way = self._under_way.get()
        if under_way is None:
            return False
        layer, host, copying = under_way
        try:
            copying.synchronize()
            layer.frames.set_result(layer.sender.frames(layer.number, layer.lengths, host))
        except Exception as error:
            layer.frames.set_exception(error)
        return True


def _drawn(layer: int, frames: Future[Frames]) -> Frames:
    while not frames.done():
        yield frames
    error = frames.exception()
    if error is not None:
        raise InternalError(f"layer {layer} could not be copied to the host: {error}") from error
    yield from frames.result()
