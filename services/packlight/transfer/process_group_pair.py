"""Two processes as a group of torch.distributed: how they meet, and sending and receiving between them.

Knows stores, groups, backends and timeouts. Does not know layers or shipments. There is no default group and nothing
global: a group is an object, and a process may have any number of them.

Words (small tensors of int64) go by Gloo. Payloads go by NCCL where both ends have a GPU, else by Gloo as well. Both
backends keep the order in which operations are begun; Gloo matches them by tag, too.

A wait that runs out closes Gloo's connection, at both ends and for every operation on it. That is what makes a group
safe to give up, and `drop` uses it: nothing else ends a Gloo operation that waits.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from packlight.core.errors import ShipmentIncompatible

dist: Any = torch.distributed  # its stubs know no stores, and little of what a group can do
Store = Any
Work = Any

RECEIVER, SENDER = 0, 1  # ranks
WORD_TAG, PAYLOAD_TAG, ACK_TAG, NEVER_TAG = 1, 2, 3, 4
MEETING_TIMEOUT_S = 5.0
ASKS = "asks"
_POLL_S = 100e-6
# torch's own answer to an operation that fails or takes long is to end the process, where another peer's may go on.
_NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a receiver can be met, and what it receives into. `id` tells it from whoever had the port before."""

    host: str
    port: int
    device: str
    id: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}/{self.device}/{self.id}"

    @staticmethod
    def parse(text: str) -> Meeting:
        """What `str` of it was."""
        address, device, id = text.split("/")
        host, _, port = address.rpartition(":")
        return Meeting(host.strip("[]"), int(port), device, id)


def payload_device(device: torch.device) -> torch.device:
    """Where payloads are sent from and received into by a worker that computes on `device`."""
    return device if device.type == "cuda" and dist.is_nccl_available() else torch.device("cpu")


def open_store(listen_on: str) -> Store:
    """A store that listens on a free port of `listen_on`, and nowhere else. Raises ShipmentIncompatible."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise ShipmentIncompatible("this torch has no torch.distributed with Gloo")
    family = socket.AF_INET6 if ":" in listen_on else socket.AF_INET
    try:
        with socket.create_server((listen_on, 0), family=family) as listener:
            return dist.TCPStore(
                listen_on,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(days=1),
                master_listen_fd=listener.detach(),
            )
    except (OSError, RuntimeError) as error:
        raise ShipmentIncompatible(f"no store can listen on {listen_on}: {error}") from None


def part_of(store: Store, name: str) -> Store:
    """For one pair, over a connection of its own: an operation that waits blocks the whole connection."""
    return dist.PrefixStore(name, store.clone())


def ask(meeting: Meeting, own_host: str, device: torch.device) -> Pair:
    """The sender's end of a new pair. Raises OSError or RuntimeError if the receiver does not answer in time."""
    # Looked for first: a store that is not there is asked again and again, with a stack trace each time.
    socket.create_connection((meeting.host, meeting.port), timeout=MEETING_TIMEOUT_S).close()
    store = dist.TCPStore(
        meeting.host,
        meeting.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=MEETING_TIMEOUT_S),
    )
    if store.get("id") != meeting.id.encode():
        raise RuntimeError(f"somebody else listens on {meeting.host}:{meeting.port} now")
    name = secrets.token_hex(8)
    store.queue_push(ASKS, f"{name}/{device.type}")
    return Pair(dist.PrefixStore(name, store), SENDER, own_host, device)


class Pair:
    """One end of the groups between a sender and a receiver. Every wait raises RuntimeError when the other end is gone,
    when it runs out, or after `drop`."""

    def __init__(self, store: Store, rank: int, host: str, device: torch.device) -> None:
        """Waits for the other end to do the same. `host` is an address of this machine."""
        self._peer, self._rank = 1 - rank, rank
        self._words = _gloo(dist.PrefixStore("words", store), rank, host)
        self._nccl = _nccl(dist.PrefixStore("payloads", store), rank) if device.type == "cuda" else None
        self._stream: Any = torch.cuda.Stream(device) if self._nccl is not None else None  # type: ignore[no-untyped-call]

    def send_words(self, words: Tensor, tag: int) -> Work:
        return self._words.send([words], self._peer, tag)

    def receive_words(self, words: Tensor, tag: int) -> Work:
        return self._words.recv([words], self._peer, tag)

    def send_payload(self, payload: Tensor, made: Any) -> Work:
        """`made` is an event on the stream that computed it, if that was a GPU's."""
        if self._nccl is None:
            return self._words.send([payload], self._peer, PAYLOAD_TAG)
        with torch.cuda.stream(self._stream):
            if made is not None:
                self._stream.wait_event(made)
            return self._nccl.send([payload], self._peer, PAYLOAD_TAG)

    def receive_payload(self, payload: Tensor) -> Work:
        if self._nccl is None:
            return self._words.recv([payload], self._peer, PAYLOAD_TAG)
        # Its memory may have been freed a moment ago, by work on the current stream that is not over.
        self._stream.wait_stream(torch.cuda.current_stream(payload.device))
        with torch.cuda.stream(self._stream):
            return self._nccl.recv([payload], self._peer, PAYLOAD_TAG)

    def wait(self, work: Work, timeout_s: float) -> None:
        work.wait(timedelta(seconds=timeout_s))

    def wait_for_payload(self, work: Work, timeout_s: float) -> None:
        """NCCL's own wait makes a stream wait, not the caller."""
        if self._nccl is None:
            return self.wait(work, timeout_s)
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a payload was still on its way after {timeout_s:.1f} s")
            time.sleep(_POLL_S)

    def drop(self) -> None:
        """End every operation at both ends, from any thread."""
        with suppress(RuntimeError):
            self._words.recv([torch.empty(1)], self._peer, NEVER_TAG).wait(timedelta(milliseconds=1))
        if self._nccl is not None:
            self._nccl.abort()


def _gloo(store: Store, rank: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timedelta(seconds=MEETING_TIMEOUT_S)
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int) -> Any:
    for name, value in _NCCL_SETTINGS.items():
        os.environ.setdefault(name, value)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)  # what takes too long is for `wait_for_payload` to say
    return dist.ProcessGroupNCCL(store, rank, 2, options)
