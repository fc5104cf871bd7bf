"""A stream of a device beside the one that computes: what copies run on, in the order in which they were given.

Knows streams and events. Does not know what is copied, nor whose memory it is. Whoever gives work keeps the host's
memory until it is done. Memory that both streams use is ordered by the two methods that name the computing stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from packlight.kv.lending import Bytes, pinned


class Done(Protocol):
    """The end of some work, as a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has come."""
        ...

    def synchronize(self) -> None:
        """Wait until it has come. Raises RuntimeError if it will not."""
        ...


class SideStream(Protocol):
    def allocate(self, num_bytes: int) -> Bytes:
        """Host memory that copies need not be waited for."""
        ...

    def computed(self) -> Any:
        """The moment when all that was given to the computing stream until now is done: a name for it."""
        ...

    def run(self, work: Callable[[], object], after: Any) -> Done:
        """Begin `work` once the moment `after` has come and all that was given before is done. Does not wait for it."""
        ...

    def hold_computing(self) -> None:
        """What is given to the computing stream from now on begins after all that was given here. No host waits."""
        ...


class CudaSideStream:
    def __init__(self, device: torch.device) -> None:
        self._computing = torch.cuda.default_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, num_bytes: int) -> Bytes:
        return pinned(num_bytes)

    def computed(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._computing)
        return event

    def run(self, work: Callable[[], object], after: Any) -> Done:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits sleeps
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            work()
            done.record()
        return done

    def hold_computing(self) -> None:
        self._computing.wait_stream(self._stream)


def moved(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, which the host does not wait for. Goes through pinned memory, which torch does not use again
    before the copy is done; a tensor that is there already is not copied."""
    if device.type == "cpu" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
