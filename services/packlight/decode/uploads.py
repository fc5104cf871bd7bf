"""The way of arrived layers from the host's memory into a GPU's pages, beside the steps that run there.

A layer that arrived is put into pinned memory, unless it lies there or on the device already. From there it is copied,
decoded and written to its pages on a side stream (`kv/side_stream.py`), and the host goes on at once. What must not
come too early:

- A step reads the pages when the copy is done: whoever makes the request ready waits for it, on the host. A wait in the
  stream that steps run on would hold up those of all other requests.
- Pinned memory is lent again (`kv/lending.py`) when the copy out of it is done. It is bounded: what comes faster than
  the device takes it waits, and by flow control its sender does.
- The pages of a request that ends while it arrives go back to the books at once, so they have a next owner before the
  copy is done. If that one computes, the device puts it behind the copy; if it arrives, the stream has it in order.

Knows payloads and copies. Does not know pages, requests or codecs. Awaits nothing: `fetch.py` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from torch import Tensor

from packlight.kv.lending import Lending
from packlight.kv.pool import PackedPool
from packlight.kv.side_stream import CudaSideStream, Done, SideStream

LIMIT_BYTES = 256 << 20
"""Of pinned memory. A link of 50 GB/s takes that in 5 ms."""


class _UnderWay(NamedTuple):
    done: Done
    payload: Tensor


class Uploads:
    """Of one worker. Used from the thread that owns the pool's books. A device that is gone raises RuntimeError."""

    def __init__(self, side: SideStream, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._side, self._limit_bytes = side, limit_bytes
        self._pinned = Lending(limit_bytes, side.allocate)
        self._under_way: deque[_UnderWay] = deque()
        self._freed = side.computed()

    @classmethod
    def into(cls, pool: PackedPool) -> Uploads | None:
        """None where the host writes pages itself: on CPUs, and where pages go on to other ranks."""
        is_on_gpu = pool.device.type == "cuda" and pool.num_shards == 1
        return cls(CudaSideStream(pool.device)) if is_on_gpu else None

    def start(self, payload: Tensor, store: Callable[[Tensor], object]) -> Done:
        """Begin `store` with the bytes of `payload`, flat uint8, behind all that was begun before. When this returns,
        `payload` may change, unless it is pinned or on a device: then it must not while anybody holds it."""
        self.forget_done()
        payload = payload if _stays(payload) else self._pinned_copy(payload)
        try:
            done = self._side.run(partial(store, payload), after=self._freed)
        except Exception:  # some of it may be under way to pages that now go back
            self._side.hold_computing()
            raise
        self._under_way.append(_UnderWay(done, payload))
        return done

    @property
    def in_the_way(self) -> Done | None:
        """What must be done before more is taken in; None if there is room."""
        self.forget_done()
        is_full = self._pinned.num_lent_bytes > self._limit_bytes
        return self._under_way[0].done if is_full and self._under_way else None

    def abandon(self, last: Done) -> None:
        """Pages that copies up to `last` are written to go back to the books now."""
        with suppress(RuntimeError):  # a device that is gone writes nothing
            if not last.query():
                self._side.hold_computing()

    def freed(self) -> None:
        """Pages went back to the books: copies that begin later come after all that steps do until now."""
        with suppress(RuntimeError):
            self._freed = self._side.computed()

    def forget_done(self) -> None:
        """Lets payloads go that were read: their memory may be a prefill worker's. They end in the order of `start`."""
        while self._under_way and self._under_way[0].done.query():
            self._under_way.popleft()

    def _pinned_copy(self, payload: Tensor) -> Tensor:
        return self._pinned.lend(payload.numel()).copy_(payload)


def _stays(payload: Tensor) -> bool:
    """Payloads on a device have memory of their own, and so have pinned ones: of a prefill worker of this process."""
    return payload.device.type != "cpu" or payload.is_pinned()
