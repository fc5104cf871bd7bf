"""Links: ways beside the stream from one sending worker to one receiving worker, shared by their shipments.

Knows when a link is used, when it is given up and for how long, and that a layer it does not carry goes inline. Does
not know what a link is made of.

A link comes to be while the first shipments already go inline. It breaks for good: with the first operation that fails
or is not over within `deadline_s`. Then its layers go inline, and for `REST_S` the pair takes its next transport; who
asks later makes a new link.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from packlight.core.errors import ShipmentIncompatible
from packlight.core.shipping import LayerHeader, ShipFrame
from packlight.transfer.base import Pending
from packlight.transfer.inline import InlineSender

REST_S = 10.0
PATIENCE_S = 5.0
LEAST_BYTES_PER_S = 20e6  # a link slower than this is no better than the stream
OVERDUE = 3.0  # times the deadline: so late, the link's own thread hangs in its library, and gives nothing up any more

MADE, FAILED, DROPPED = "made", "not made", "dropped"
"""What happens to a link, as logs and metrics say it."""


def deadline_s(num_bytes: int) -> float:
    """The longest that sending so much may take."""
    return PATIENCE_S + num_bytes / LEAST_BYTES_PER_S


class LinkDown(Exception):
    """A link that cannot carry a layer now. Never leaves the sender."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A payload that lies at the receiver, where `offset` says."""

    offset: int
    checksum: int


class Link(Protocol):
    ready: Future[None]
    """Done when it carries layers, or failed."""

    device: torch.device
    """Where it wants payloads."""

    @property
    def is_broken(self) -> bool: ...

    def give_up(self) -> None:
        """A layer is overdue. Neither waits nor raises."""
        ...

    def close(self) -> None: ...


L = TypeVar("L", bound=Link)


class Links(Generic[L]):
    """The links of one sending worker, by what names the receiving one. Used from one thread."""

    def __init__(self, make: Callable[[str], L], clock: Callable[[], float] = time.monotonic) -> None:
        """`make` starts making a link, and does not wait for it."""
        self._make, self._clock = make, clock
        self._links: dict[str, L] = {}
        self._broken_since: dict[str, float] = {}

    def get(self, peer: str) -> L:
        """Raises ShipmentIncompatible while the pair rests from a link that broke."""
        self._give_up_broken()
        if peer in self._broken_since:
            left_s = REST_S - (self._clock() - self._broken_since[peer])
            raise ShipmentIncompatible(f"the link broke; the next is tried in {left_s:.0f} s")
        if peer not in self._links:
            self._links[peer] = self._make(peer)
        return self._links[peer]

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _give_up_broken(self) -> None:
        now = self._clock()
        for peer in [peer for peer, link in self._links.items() if link.is_broken]:
            self._links.pop(peer).close()
            self._broken_since[peer] = now
        self._broken_since = {peer: since for peer, since in self._broken_since.items() if now - since < REST_S}


class LinkSender:
    """One shipment's layers over a link; inline, those that it does not carry."""

    def __init__(
        self,
        link: Link,
        submit: Callable[[Tensor], Future[Landed]],
        release: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`submit` begins to send a payload over `link`: it neither waits nor raises. `release` tells the link that the
        shipment is over, whatever is under way."""
        self._link, self._submit, self._release, self._clock = link, submit, release, clock
        self.device, self.ready = link.device, link.ready
        self._inline = InlineSender()
        self._under_way: list[Future[Landed]] = []
        self._is_released = False

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame | Pending]:
        """Sending begins now, not when the frames are drawn."""
        landing = refused("the shipment is over") if self._is_released else self._submit(payload)
        self._under_way.append(landing)
        return self._frames(layer, lengths, payload, landing)

    def release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        for landing in self._under_way.copy():  # the compute thread may add one more
            landing.cancel()
        if self._release is not None:
            self._release()

    def _frames(
        self, layer: int, lengths: tuple[int, ...], payload: Tensor, landing: Future[Landed]
    ) -> Iterator[ShipFrame | Pending]:
        overdue_s = self._clock() + OVERDUE * deadline_s(payload.numel())
        while not landing.done() and not self._link.is_broken and self._clock() < overdue_s:
            yield landing
        if not landing.done():
            self._link.give_up()
        elif not landing.cancelled() and landing.exception() is None:
            landed = landing.result()
            yield LayerHeader(layer, lengths, payload.numel(), landed.checksum, landed.offset)
            return
        yield from self._inline.frames(layer, lengths, payload.cpu())


def now_on(payload: Tensor) -> Any:
    """An event of the GPU's stream that computes `payload`, None on a CPU."""
    if not payload.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def refused(why: str) -> Future[Landed]:
    """What `submit` answers for a layer that it does not carry."""
    landing: Future[Landed] = Future()
    landing.set_exception(LinkDown(why))
    return landing
