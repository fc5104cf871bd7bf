"""Writing layers into the memory of receivers: one NIXL agent and one thread for all links of a sending worker.

Knows writes and their deadlines. NIXL has none of its own: a write to a process that is frozen stays in progress for
ever. So a link is given up with the first write that fails or is late: the peer is removed, which ends its connection,
and what NIXL does not let go of is kept, never reused.

When a shipment is over and nothing of it is under way, its receiver is told: from then on it may use the memory again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packlight.core.errors import ShipmentIncompatible
from packlight.transfer.base import CPU, Site, checksum_where_it_lies, word_sum
from packlight.transfer.links import DROPPED, FAILED, MADE, Landed, LinkDown, deadline_s, now_on, refused
from packlight.transfer.nixl_agent import Agent

NAME = "nixl"
POLL_S = 200e-6
JOIN_S = 30.0  # NIXL may stay in a call for long, and a process that ends under it aborts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """A receiver: its agent's `metadata`, and the kind and device of its memory."""

    kind: str
    device: int
    metadata: bytes


@dataclass(slots=True, eq=False)
class Outgoing:
    """One shipment's part of a receiver's memory, and how much of it is used. `slab` is the receiver's name for it."""

    slab: int
    address: int
    num_bytes: int
    num_used: int = 0
    num_under_way: int = 0
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Write:
    """A layer under way."""

    shipment: Outgoing
    offset: int
    payload: Tensor
    checksum: int
    registered: Any
    handle: Any
    late_at_s: float
    landing: Future[Landed]


@dataclass(slots=True, eq=False)
class WritingLink:
    """A receiver as the writer knows it. Its thread changes it; others look."""

    peer: Peer
    writer: Writer
    device: torch.device
    ready: Future[None] = field(default_factory=Future)
    is_broken: bool = False
    name: str = ""
    writes: list[Write] = field(default_factory=list)
    over: list[int] = field(default_factory=list)

    def submit(self, shipment: Outgoing, payload: Tensor) -> Future[Landed]:
        """Begin to send a layer. It neither waits nor raises."""
        if self.is_broken or not self.ready.done():
            return refused("the link is not made, or broke")
        return self.writer.submit(self, shipment, payload.to(self.device))

    def end(self, shipment: Outgoing) -> None:
        self.writer.end(self, shipment)

    def give_up(self) -> None:
        """From outside the thread, which does not come back from NIXL. What it holds, it keeps."""
        self.is_broken = True

    def close(self) -> None:
        self.writer.close_link(self)


class Writer:
    """Runs its thread from the first link until `close`."""

    def __init__(self, site: Site, make_agent: Callable[[], Agent] | None = None) -> None:
        self._site = site
        self._make_agent = make_agent or (lambda: Agent(f"packlight-{secrets.token_hex(8)}"))
        self._lock = threading.Lock()
        self._is_closed = False
        self._commands: queue.SimpleQueue[Callable[[Agent], None] | None] = queue.SimpleQueue()
        self._links: list[WritingLink] = []
        self._unfinished: list[Write] = []  # of links that are gone; NIXL may still read the payloads
        self._thread: threading.Thread | None = None

    def link(self, peer: Peer) -> WritingLink:
        """It is made in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="packlight-nixl", daemon=True)
            self._thread.start()
        device = self._site.device if peer.kind == "VRAM" else CPU
        link = WritingLink(peer, self, device)
        self._commands.put(lambda agent: self._connect(agent, link))
        return link

    def submit(self, link: WritingLink, shipment: Outgoing, payload: Tensor) -> Future[Landed]:
        landing: Future[Landed] = Future()
        made = now_on(payload)
        with self._lock:
            if self._is_closed:
                return refused("the writer was closed")
            self._commands.put(lambda agent: self._post(agent, link, shipment, payload, made, landing))
        return landing

    def end(self, link: WritingLink, shipment: Outgoing) -> None:
        """Nothing more is sent of it."""
        self._commands.put(lambda agent: self._end(agent, link, shipment))

    def close_link(self, link: WritingLink) -> None:
        self._commands.put(lambda agent: self._drop(agent, link, LinkDown("the link was closed"), is_expected=True))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._commands.put(None)  # the last one
        if self._thread is not None:
            self._thread.join(timeout=JOIN_S)
            if self._thread.is_alive():
                log.error("NIXL has not returned for %.0f s: the process ends under it, and may abort", JOIN_S)

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        """Whatever happens, every command is answered until `close`."""
        try:
            agent = self._make_agent()
        except ShipmentIncompatible as error:
            log.warning("no NIXL: %s", error)
            return self._refuse_all(error)
        try:
            self._serve(agent)
        except Exception as error:
            log.exception("writing by NIXL ended")
            self._drop_all(agent)
            return self._refuse_all(error)
        self._drop_all(agent)
        agent.close()

    def _serve(self, agent: Agent) -> None:
        while True:
            command: Callable[[Agent], None] | None = _nothing
            with suppress(queue.Empty):
                command = self._commands.get(timeout=POLL_S if any(link.writes for link in self._links) else None)
            if command is None:
                return
            command(agent)
            for link in self._links.copy():
                self._poll(agent, link)

    def _drop_all(self, agent: Agent) -> None:
        for link in self._links.copy():
            self._drop(agent, link, LinkDown("the writer was closed"), is_expected=True)

    def _refuse_all(self, error: Exception) -> None:
        agent: Any = _Unable(error)
        while (command := self._commands.get()) is not None:
            command(agent)

    def _connect(self, agent: Agent, link: WritingLink) -> None:
        try:
            link.name = agent.add_peer(link.peer.metadata)
        except Exception as error:  # each of NIXL's is a class of its own
            log.warning("a NIXL link was %s: %s", FAILED, error)
            self._site.on_link(NAME, FAILED)
            link.is_broken = True
            link.ready.set_exception(LinkDown("the link could not be made"))
            return
        self._links.append(link)
        self._site.on_link(NAME, MADE)
        link.ready.set_result(None)

    def _post(
        self, agent: Agent, link: WritingLink, shipment: Outgoing, payload: Tensor, made: Any, landing: Future[Landed]
    ) -> None:
        if not landing.set_running_or_notify_cancel():
            return
        offset, num_bytes = shipment.num_used, payload.numel()
        if link.is_broken or shipment.is_over or offset + num_bytes > shipment.num_bytes:
            landing.set_exception(LinkDown("the link broke, the shipment is over, or its memory is full"))
            return
        try:
            if made is not None:
                made.synchronize()
            check = word_sum(payload) if link.peer.kind == "VRAM" else checksum_where_it_lies(payload)
            if num_bytes == 0:
                landing.set_result(Landed(offset, check))
                return
            write = self._write(agent, link, shipment, payload)
        except Exception as error:
            landing.set_exception(LinkDown("the link broke"))
            self._drop(agent, link, error)
            return
        link.writes.append(
            Write(shipment, offset, payload, check, *write, time.monotonic() + deadline_s(num_bytes), landing)
        )
        shipment.num_used += num_bytes
        shipment.num_under_way += 1

    def _write(self, agent: Agent, link: WritingLink, shipment: Outgoing, payload: Tensor) -> tuple[Any, Any]:
        """(registration, handle)"""
        registered = agent.register(payload)
        try:
            peer, address = link.peer, shipment.address + shipment.num_used
            return registered, agent.write(payload, link.name, peer.kind, peer.device, address)
        except Exception:
            agent.unregister(registered)
            raise

    def _poll(self, agent: Agent, link: WritingLink) -> None:
        for write in link.writes.copy():
            try:
                is_done = agent.is_done(write.handle)
            except Exception as error:
                return self._drop(agent, link, error)
            if is_done:
                self._finish(agent, link, write)
            elif time.monotonic() > write.late_at_s:
                return self._drop(agent, link, LinkDown(f"a write of {write.payload.numel()} bytes is late"))

    def _finish(self, agent: Agent, link: WritingLink, write: Write) -> None:
        """What arrived has arrived, whatever NIXL then says of its own books."""
        link.writes.remove(write)
        self._release(agent, write)
        write.landing.set_result(Landed(write.offset, write.checksum))
        write.shipment.num_under_way -= 1
        self._tell_if_over(agent, link, write.shipment)

    def _end(self, agent: Agent, link: WritingLink, shipment: Outgoing) -> None:
        shipment.is_over = True
        self._tell_if_over(agent, link, shipment)

    def _tell_if_over(self, agent: Agent, link: WritingLink, shipment: Outgoing) -> None:
        """A link that broke tells nothing: its receiver finds out by its own means."""
        if shipment.is_over and shipment.num_under_way == 0 and link in self._links:
            try:
                agent.notify(link.name, str(shipment.slab).encode())
            except Exception as error:
                self._drop(agent, link, error)

    def _drop(self, agent: Agent, link: WritingLink, error: Exception, *, is_expected: bool = False) -> None:
        """The end of a link, whatever is under way."""
        if link not in self._links:
            return
        self._links.remove(link)
        link.is_broken = True
        if not is_expected:
            log.warning("a NIXL link was %s: %s", DROPPED, error)
            self._site.on_link(NAME, DROPPED)
        with suppress(Exception):
            agent.remove_peer(link.name)
        for write in link.writes:
            self._let_go(agent, write)
        link.writes.clear()

    def _let_go(self, agent: Agent, write: Write) -> None:
        self._release(agent, write)
        write.landing.set_exception(LinkDown("the link broke"))

    def _release(self, agent: Agent, write: Write) -> None:
        try:
            agent.release(write.handle)
            agent.unregister(write.registered)
        except Exception as error:
            log.warning("NIXL keeps a write of %d bytes: %s", write.payload.numel(), error)
            self._unfinished.append(write)


class _Unable:
    """An agent that could not be made."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def add_peer(self, metadata: bytes) -> str:
        raise self._error


def _nothing(agent: Agent) -> None:
    """It is only time to look at the writes."""
