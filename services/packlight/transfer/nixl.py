"""Transport by NIXL: layers are written straight into the receiver's memory, over RDMA where there is some.

Knows offers, headers and the receiver's memory. Writing is `nixl_writer.py`'s, the library `nixl_agent.py`'s.

The receiver registers one arena for good and deals it out: a slab per shipment, offered with the address and what
connects to its agent. What does not fit into a slab goes inline. A slab whose sender may still write into it is not
used again until that sender says that it is over. If it never does - it died, or froze - the agent is replaced when
the arena is full: with the old one all connections end, so that nobody writes there any more.
"""

from __future__ import annotations

import base64
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import LayerHeader, ShipFrame
from packlight.transfer.arena import Arena, Slab
from packlight.transfer.base import KVReceiver, KVSender, LayerOrder, ReceivedLayer, Site
from packlight.transfer.inline import InlineReceiver
from packlight.transfer.links import Links, LinkSender
from packlight.transfer.nixl_agent import Agent, where_is
from packlight.transfer.nixl_writer import Outgoing, Peer, Writer, WritingLink

_OFFER = re.compile(
    r"(?P<slab>\d{1,15})/(?P<address>\d{1,20})/(?P<size>\d{1,15})"
    r"/(?P<peer>(?P<kind>DRAM|VRAM)/(?P<device>\d{1,3})/(?P<metadata>[\w=-]{1,65536}))"
)
LOST_AFTER_S = 10.0
log = logging.getLogger(__name__)


class NixlTransport:
    """Both ends of it: memory and an agent from the first receiver on, a writer from the first sender on."""

    def __init__(self, site: Site | None = None) -> None:
        self._site = site or Site()
        self._inbox: Inbox | None = None
        self._refusal: ShipmentIncompatible | None = None
        self._writer = Writer(self._site)
        self._links: Links[WritingLink] = Links(lambda peer: self._writer.link(_parse_peer(peer)))

    def sender(self, offer: str) -> KVSender:
        parsed = _OFFER.fullmatch(offer)
        if parsed is None:
            raise ShipmentIncompatible(f"{offer[:80]!r} is no offer of NIXL")
        link = self._links.get(parsed["peer"])
        shipment = Outgoing(int(parsed["slab"]), int(parsed["address"]), int(parsed["size"]))
        return LinkSender(link, lambda payload: link.submit(shipment, payload), lambda: link.end(shipment))

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        if self._refusal is not None:
            raise self._refusal
        if self._inbox is None:
            self._inbox = self._make_inbox()
        order = LayerOrder(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
        return NixlReceiver(self._inbox, num_layers, num_layers * max_layer_bytes, order)

    def _make_inbox(self) -> Inbox:
        """Once: what does not start now does not start with the next request either."""
        try:
            return Inbox(self._site)
        except ShipmentIncompatible as error:
            log.warning("nixl is not offered: %s", error)
            self._refusal = error
            raise

    def close(self) -> None:
        self._links.close()
        self._writer.close()
        if self._inbox is not None:
            self._inbox.close()


class NixlReceiver:
    def __init__(self, inbox: Inbox, num_layers: int, num_bytes: int, order: LayerOrder) -> None:
        self._inbox, self._order, self._num_layers_left = inbox, order, num_layers
        self._slab, self.offer = inbox.take(num_bytes)
        self._inline = InlineReceiver(order)
        self._is_released = False

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        """As told by a stranger: no offset or size that `frame` may hold is followed outside the slab."""
        if not isinstance(frame, LayerHeader) or frame.offset is None:
            return self._inline.take(frame)
        self._inline.between_layers()
        self._order.expect(frame)
        end = frame.offset + frame.num_bytes
        if not 0 <= frame.offset <= end <= self._slab.num_bytes:
            raise ShipmentCorrupt(
                f"layer {frame.layer} is said to lie at bytes {frame.offset} to {end} of {self._slab.num_bytes}"
            )
        payload = self._inbox.memory[self._slab.start + frame.offset : self._slab.start + end]
        self._order.verify_where_it_lies(frame, payload)
        self._num_layers_left -= 1
        return ReceivedLayer(frame.layer, frame.lengths, payload)

    def release(self, *, unused: bool = False) -> None:
        """A header comes when its layer is written: if all came, nothing is under way."""
        self._inline.release()
        if not self._is_released:
            self._is_released = True
            self._inbox.give_back(self._slab, is_clean=unused or self._num_layers_left == 0)


class Inbox:
    """The memory that senders write into, and the agent that lets them. Used from one thread."""

    def __init__(
        self,
        site: Site,
        make_agent: Callable[[str, Tensor], Agent] = Agent,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ShipmentIncompatible where there is no NIXL."""
        self._make, self._clock = make_agent, clock
        self.memory: Tensor = torch.empty(site.staging_bytes, dtype=torch.uint8, device=site.device)
        self._arena = Arena(site.staging_bytes)
        self._agent: Agent | None = self._make_agent()
        self._successor: Agent | None = None
        self._renewal: threading.Thread | None = None

    def take(self, num_bytes: int) -> tuple[Slab, str]:
        """A slab of at most `num_bytes`, and its offer. Raises ShipmentIncompatible if there is none just now."""
        agent = self._current_agent()
        if agent is None:
            raise ShipmentIncompatible("the NIXL agent is being replaced")
        self._hear(agent)
        slab = self._arena.take(num_bytes)
        if slab is None:
            self._renew_if_that_helps()
            raise ShipmentIncompatible(f"too few of {self._arena.num_bytes} bytes of NIXL memory are free")
        kind, device = where_is(self.memory)
        metadata = base64.urlsafe_b64encode(agent.metadata).decode()
        address = self.memory.data_ptr() + slab.start
        return slab, f"{slab.number}/{address}/{slab.num_bytes}/{kind}/{device}/{metadata}"

    def give_back(self, slab: Slab, *, is_clean: bool) -> None:
        self._arena.give_back(slab.number, is_clean=is_clean, now_s=self._clock())

    def close(self) -> None:
        if self._renewal is not None:
            self._renewal.join()
        agent, self._agent = self._current_agent(), None
        if agent is not None:
            agent.close()

    def _hear(self, agent: Agent) -> None:
        for message in agent.notifications():
            if message.isdigit():
                self._arena.clear(int(message))

    def _renew_if_that_helps(self) -> None:
        """Half a second of work, so beside the event loop; meanwhile nothing is offered."""
        num_lost = self._arena.num_lost_bytes(self._clock() - LOST_AFTER_S)
        if num_lost == 0:
            return
        log.warning("%d bytes of NIXL memory wait for senders that are gone: the agent is replaced", num_lost)
        old, self._agent = self._agent, None
        self._renewal = threading.Thread(target=self._replace, args=(old,), name="packlight-nixl-renewal", daemon=True)
        self._renewal.start()

    def _replace(self, old: Agent | None) -> None:
        """On a thread of its own."""
        if old is not None:
            old.close()
        try:
            self._successor = self._make_agent()
        except ShipmentIncompatible as error:
            log.error("no NIXL any more: %s", error)

    def _current_agent(self) -> Agent | None:
        successor, self._successor = self._successor, None
        if successor is not None:
            self._agent = successor
            self._arena.clear_all()
        return self._agent

    def _make_agent(self) -> Agent:
        return self._make(f"packlight-{secrets.token_hex(8)}", self.memory)


def _parse_peer(text: str) -> Peer:
    kind, device, metadata = text.split("/")
    return Peer(kind, int(device), base64.urlsafe_b64decode(metadata))
