"""Host memory that is lent for a while, and comes back by itself when nobody can read it any more.

Memory that is asked for anew costs more than filling it: the system hands it out page by page, zeroed, on first touch.
A prefill worker fills and forgets a layer's pages a hundred times a second, so it keeps them. Knows bytes. Does not
know what is in them, nor who reads them: who asks "is it sent?" can be wrong, so what counts is whether a tensor, an
array or a memoryview of the lent bytes still exists.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 64
STEPS = 8
"""Sizes between one power of two and the next: a buffer serves layers that are almost alike."""


def pageable(num_bytes: int) -> Bytes:
    """Memory of the system, aligned to cache lines, untouched."""
    memory = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes]


def pinned(num_bytes: int) -> Bytes:
    """Memory that a GPU copies to while the host does something else."""
    memory: Bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def _nothing() -> None:
    pass


class Lending:
    """Lends buffers, and keeps those that came back as long as all together are at most `limit_bytes`. One thread
    lends; buffers come back on whichever forgets them."""

    def __init__(self, limit_bytes: int, allocate: Callable[[int], Bytes] = pageable) -> None:
        self._limit_bytes, self._allocate = limit_bytes, allocate
        self._idle: deque[Bytes] = deque()
        self._returned: deque[Bytes] = deque()  # appended to by any thread, without a lock
        self._num_idle_bytes = self._num_lent_bytes = 0

    @property
    def num_lent_bytes(self) -> int:
        """The size of the buffers that somebody may still read."""
        self._collect()
        return self._num_lent_bytes

    @property
    def num_idle_bytes(self) -> int:
        self._collect()
        return self._num_idle_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether what is lent stays within the limit if so much more is. A buffer larger than it is lent alone."""
        num_lent_bytes = self.num_lent_bytes
        return num_lent_bytes == 0 or num_lent_bytes + capacity_for(num_bytes) <= self._limit_bytes

    def lend(self, num_bytes: int, on_return: Callable[[], None] = _nothing) -> Tensor:
        """Flat uint8 with anything in it, lent for as long as it, or anything that shares its memory, exists.

        `on_return` is called when it came back. Like any destructor it may interrupt any thread at any point: it must
        take no lock."""
        capacity = capacity_for(num_bytes)
        self._collect()
        buffer = self._take(capacity)
        if buffer is None:
            self._forget_idle(self._limit_bytes - self._num_lent_bytes - capacity)
            buffer = self._allocate(capacity)
        self._num_lent_bytes += len(buffer)
        lent = buffer[:num_bytes]
        # Torch's storage holds this very array until the last view of it is gone.
        weakref.finalize(lent, self._come_back, buffer, on_return).atexit = False
        return torch.from_numpy(lent)

    def _take(self, capacity: int) -> Bytes | None:
        """The smallest idle buffer that fits and is not more than twice too large."""
        fitting = [index for index, buffer in enumerate(self._idle) if capacity <= len(buffer) <= 2 * capacity]
        if not fitting:
            return None
        index = min(fitting, key=lambda index: len(self._idle[index]))
        buffer = self._idle[index]
        del self._idle[index]
        self._num_idle_bytes -= len(buffer)
        return buffer

    def _come_back(self, buffer: Bytes, on_return: Callable[[], None]) -> None:
        self._returned.append(buffer)
        on_return()

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._num_lent_bytes -= len(buffer)
            self._idle.append(buffer)
            self._num_idle_bytes += len(buffer)
        self._forget_idle(self._limit_bytes - self._num_lent_bytes)

    def _forget_idle(self, most_bytes: int) -> None:
        """What has been idle longest goes first."""
        while self._idle and self._num_idle_bytes > most_bytes:
            self._num_idle_bytes -= len(self._idle.popleft())


def capacity_for(num_bytes: int) -> int:
    """`num_bytes`, rounded up to one of STEPS sizes per power of two, and to cache lines."""
    step = max(ALIGNMENT, (1 << max(num_bytes - 1, 0).bit_length()) // (2 * STEPS))
    return max(1, -(-num_bytes // step)) * step
