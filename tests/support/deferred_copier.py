"""A device that a test drives: copies to the host start when they are told to, and end when the test says so.

Until then the host's memory holds poison. Whoever looks at it too early, or gets it while another layer is in it, reads
something that no payload of the tests contains."""

from __future__ import annotations

import queue
import threading

from torch import Tensor

from packlight.kv.lending import Bytes, pageable

POISON = 0xDB
PATIENCE_S = 30.0


class DeferredCopy:
    def __init__(self, host: Tensor, payload: Tensor) -> None:
        self._tensors: tuple[Tensor, Tensor] | None = (host.fill_(POISON), payload)
        self._ended, self._error = threading.Event(), None

    def finish(self) -> None:
        """The bytes arrive. The device has no use for the memory any more."""
        host, payload = self._tensors
        host.copy_(payload)
        self._end()

    def fail(self) -> None:
        self._error = RuntimeError("the device is gone")
        self._end()

    def _end(self) -> None:
        self._tensors = None
        self._ended.set()

    def synchronize(self) -> None:
        assert self._ended.wait(PATIENCE_S), "the test never ended a copy"
        if self._error is not None:
            raise self._error


class DeferredCopier:
    """`started` has the copies in the order in which they were started."""

    def __init__(self) -> None:
        self.started: queue.Queue[DeferredCopy] = queue.Queue()
        self.refuses = False
        self.num_allocated_bytes = 0

    def allocate(self, num_bytes: int) -> Bytes:
        self.num_allocated_bytes += num_bytes
        return pageable(num_bytes)

    def now(self, payload: Tensor) -> tuple[str, int]:
        return ("made", payload.data_ptr())

    def start(self, host: Tensor, payload: Tensor, made: tuple[str, int]) -> DeferredCopy:
        assert made == ("made", payload.data_ptr()), "started by the moment of another layer"
        if self.refuses:
            raise RuntimeError("the device is gone")
        copy = DeferredCopy(host, payload)
        self.started.put(copy)
        return copy

    def next(self) -> DeferredCopy:
        return self.started.get(timeout=PATIENCE_S)
