"""Layers through a pair of groups: a thread at each end, the same order at both. This is the sending end.

    sender                                      receiver
    [shipment, number, size] ──words──▶         makes room
    payload ──Gloo or NCCL──▶                   stores it, or drops it if nobody waits
              ◀──words── [number, 1 or 0]       1: it lies there, and its header may be sent

Up to `WINDOW` layers are under way at once. Every operation has a deadline; with the first that fails the link is over
at both ends, and with it every layer that was under way: the sender still has them, and sends them inline. Memory that
an operation may touch is held until the pair is gone.

Where nothing is to be sent for `PING_S`, an empty layer of no shipment is: so both ends notice the other's death while
they are idle, and no thread waits for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packlight.transfer.base import CPU, Site, checksum_where_it_lies
from packlight.transfer.links import DROPPED, FAILED, MADE, PATIENCE_S, Landed, LinkDown, deadline_s, now_on, refused
from packlight.transfer.process_group_pair import (
    ACK_TAG,
    WORD_TAG,
    Meeting,
    Pair,
    Work,
    ask,
    payload_device,
)

NAME = "process_group"
WINDOW = 4
PING_S = 10.0
NO_SHIPMENT = 0
GOODBYE = -1  # instead of a size

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parcel:
    """A layer to send. `made` is an event of the GPU's stream that computes it."""

    shipment: int
    payload: Tensor
    made: Any = None
    landing: Future[Landed] = field(default_factory=Future)


@dataclass(slots=True)
class Posted:
    """A parcel under way: the operations that must end, in this order."""

    parcel: Parcel
    number: int
    checksum: int
    announced: Tensor
    announcing: Work
    sending: Work | None
    answer: Tensor
    answering: Work


class SendingLink:
    """The sender's end. `submit` may be called from any thread; all else happens on the link's own."""

    def __init__(self, meeting: Meeting, site: Site) -> None:
        self._meeting, self._site = meeting, site
        self.device = payload_device(site.device) if meeting.device == "cuda" else CPU
        self.ready: Future[None] = Future()
        self._lock = threading.Lock()
        self._is_open = True
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._under_way: deque[Posted] = deque()
        self._num_sent = 0
        self._thread = threading.Thread(target=self._run, name="packlight-link-out", daemon=True)
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        return not self._is_open

    def submit(self, shipment: int, payload: Tensor) -> Future[Landed]:
        """Begin to send a layer. It neither waits nor raises."""
        with self._lock:
            if not self._is_open or not self.ready.done():
                return refused("the link is not made" if self._is_open else "the link broke")
            parcel = Parcel(shipment, payload.to(self.device), now_on(payload))
            self._parcels.put(parcel)
            return parcel.landing

    def give_up(self) -> None:
        """Nothing to do: every operation has a deadline, and the link ends with the first that misses it."""

    def close(self) -> None:
        """Nothing more is sent. Returns when the thread has ended."""
        self._parcels.put(None)
        self._thread.join(timeout=2 * PATIENCE_S)

    def _run(self) -> None:
        event, pair = FAILED, None
        try:
            pair = ask(self._meeting, self._site.reach, self.device)
            event = DROPPED
            self._site.on_link(NAME, MADE)
            self.ready.set_result(None)
            self._serve(pair)
        except (RuntimeError, OSError) as error:
            log.warning("the process group with %s was %s: %s", self._meeting, event, reason(error))
            self._site.on_link(NAME, event)
        finally:
            self._end(pair)

    def _serve(self, pair: Pair) -> None:
        """Until the link is closed or breaks."""
        while True:
            while len(self._under_way) < WINDOW:
                try:
                    parcel = self._next()
                except queue.Empty:
                    break
                if parcel is None:
                    return self._take_leave(pair)
                if parcel.landing.set_running_or_notify_cancel():
                    self._begin(pair, parcel)
            self._settle(pair, self._under_way[0])
            self._under_way.popleft()

    def _next(self) -> Parcel | None:
        """What is to be sent now. Raises queue.Empty if there is something else to do."""
        if self._under_way:
            return self._parcels.get_nowait()
        try:
            return self._parcels.get(timeout=PING_S)
        except queue.Empty:
            return Parcel(NO_SHIPMENT, torch.empty(0, dtype=torch.uint8))

    def _begin(self, pair: Pair, parcel: Parcel) -> None:
        try:
            self._under_way.append(self._post(pair, parcel))
        except RuntimeError:
            parcel.landing.set_exception(LinkDown("the link broke"))
            raise

    def _post(self, pair: Pair, parcel: Parcel) -> Posted:
        self._num_sent += 1
        num_bytes, answer = parcel.payload.numel(), torch.zeros(2, dtype=torch.int64)
        announced = torch.tensor([parcel.shipment, self._num_sent, num_bytes])
        return Posted(
            parcel=parcel,
            number=self._num_sent,
            announced=announced,
            announcing=pair.send_words(announced, WORD_TAG),
            sending=pair.send_payload(parcel.payload, parcel.made) if num_bytes else None,
            answer=answer,
            answering=pair.receive_words(answer, ACK_TAG),
            checksum=checksum_where_it_lies(parcel.payload),
        )

    def _settle(self, pair: Pair, posted: Posted) -> None:
        """Wait until the layer lies at the receiver."""
        limit_s = deadline_s(posted.parcel.payload.numel())
        pair.wait(posted.announcing, limit_s)
        if posted.sending is not None:
            pair.wait_for_payload(posted.sending, limit_s)
        pair.wait(posted.answering, limit_s)
        number, is_accepted = posted.answer.tolist()
        if number != posted.number:
            raise RuntimeError(f"layer {number} was acknowledged where {posted.number} was due")
        if is_accepted:
            posted.parcel.landing.set_result(Landed(posted.number, posted.checksum))
        else:
            posted.parcel.landing.set_exception(LinkDown("the receiver does not wait for this layer"))

    def _take_leave(self, pair: Pair) -> None:
        """What was under way is not waited for."""
        goodbye = torch.tensor([NO_SHIPMENT, 0, GOODBYE])
        pair.wait(pair.send_words(goodbye, WORD_TAG), PATIENCE_S)

    def _end(self, pair: Pair | None) -> None:
        with self._lock:
            self._is_open = False
        if pair is not None:
            pair.drop()
        for posted in self._under_way:
            posted.parcel.landing.set_exception(LinkDown("the link broke"))
        self._under_way.clear()
        with suppress(queue.Empty):
            while True:
                parcel = self._parcels.get_nowait()
                if parcel is not None and parcel.landing.set_running_or_notify_cancel():
                    parcel.landing.set_exception(LinkDown("the link broke"))
        if not self.ready.done():
            self.ready.set_exception(LinkDown("the link could not be made"))


def reason(error: Exception) -> str:
    """What torch says, without where in its sources it says so, nor what it advises."""
    return str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2]
