"""The receiving end of links through process groups: where senders ask, and a thread for each that did.

Knows the order of `process_group_links.py` from the other side. What arrives goes into `Landings`, whatever it means.
"""

from __future__ import annotations

import logging
import secrets
import threading

import torch

from packlight.transfer.base import CPU, Site
from packlight.transfer.landings import Landings
from packlight.transfer.links import DROPPED, FAILED, MADE, PATIENCE_S, deadline_s
from packlight.transfer.process_group_links import GOODBYE, NAME, NO_SHIPMENT, PING_S, reason
from packlight.transfer.process_group_pair import (
    ACK_TAG,
    ASKS,
    RECEIVER,
    WORD_TAG,
    Meeting,
    Pair,
    Store,
    open_store,
    part_of,
)

SILENCE_S = 3 * PING_S
MOST_BYTES = 8 << 30  # of one layer; more is no layer

log = logging.getLogger(__name__)


class MeetingPoint:
    """The receiver's side: a store where senders ask, and a link for each that did."""

    def __init__(self, site: Site, landings: Landings) -> None:
        """Raises ShipmentIncompatible if there is no torch.distributed here."""
        self._site, self._landings = site, landings
        self._store = open_store(site.host)
        meeting = Meeting(site.reach, self._store.port, landings.device.type, secrets.token_hex(16))
        self._store.set("id", meeting.id)
        self.name = str(meeting)
        self._lock = threading.Lock()
        self._links: list[ReceivingLink] = []
        self._thread = threading.Thread(target=self._run, name="packlight-meeting-point", daemon=True)
        self._thread.start()

    @property
    def num_links(self) -> int:
        with self._lock:
            return len(self._links)

    def close(self) -> None:
        """Ends all links, and returns when their threads have ended."""
        self._store.clone().queue_push(ASKS, "")
        self._thread.join(timeout=PATIENCE_S)
        with self._lock:
            links = self._links.copy()
        for link in links:
            link.close()

    def _run(self) -> None:
        while True:
            try:
                name, _, kind = self._store.queue_pop(ASKS).decode().partition("/")
            except RuntimeError:
                continue  # nobody asked all day
            if not name:
                return
            try:
                link = ReceivingLink(part_of(self._store, name), kind, self._site, self._landings)
            except RuntimeError as error:  # no descriptor or thread is left, say: the next may find one
                log.warning("a process group with a sender was %s: %s", FAILED, reason(error))
                self._site.on_link(NAME, FAILED)
                continue
            with self._lock:
                self._links = [one for one in self._links if one.is_alive] + [link]


class ReceivingLink:
    """The receiver's end, for one sender."""

    def __init__(self, store: Store, kind: str, site: Site, landings: Landings) -> None:
        """`kind` is that of the device that payloads are sent from."""
        self._store, self._site, self._landings = store, site, landings
        self._device = landings.device if kind == "cuda" else CPU
        self._pair: Pair | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="packlight-link-in", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._is_closing, pair = True, self._pair
        if pair is not None:
            pair.drop()
        self._thread.join(timeout=2 * PATIENCE_S)

    def _run(self) -> None:
        event = FAILED
        try:
            self._pair = Pair(self._store, RECEIVER, self._site.reach, self._device)
            event = DROPPED
            self._site.on_link(NAME, MADE)
            while not self._is_closing and self._receive(self._pair):
                pass
        except RuntimeError as error:
            if not self._is_closing:
                log.warning("a process group with a sender was %s: %s", event, reason(error))
                self._site.on_link(NAME, event)
        finally:
            pair, self._pair, self._store = self._pair, None, None
            if pair is not None:
                pair.drop()

    def _receive(self, pair: Pair) -> bool:
        """One layer. False when the sender takes its leave."""
        words = torch.zeros(3, dtype=torch.int64)
        pair.wait(pair.receive_words(words, WORD_TAG), SILENCE_S)
        shipment, number, num_bytes = words.tolist()
        if num_bytes == GOODBYE:
            return False
        if not 0 <= num_bytes <= MOST_BYTES:
            raise RuntimeError(f"a layer of {num_bytes} bytes was announced")
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if num_bytes:
            pair.wait_for_payload(pair.receive_payload(payload), deadline_s(num_bytes))
        is_accepted = shipment != NO_SHIPMENT and self._landings.land(shipment, number, payload)
        answer = torch.tensor([number, int(is_accepted)])
        pair.wait(pair.send_words(answer, ACK_TAG), PATIENCE_S)
        return True
