"""NIXL, the library: whether it is there, and an agent with what is used of it.

Knows the wheel's modules and calls. They are imported when the first agent is made, and may be absent.

An agent is used from one thread at a time. Its backend is UCX: RDMA where the machine has it, else TCP and, on one
host, shared memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from packlight.core.errors import ShipmentIncompatible

MODULES = ("nixl_cu12", "nixl_cu13")
BACKENDS = ["UCX"]


def installed() -> str | None:
    """The module to import, by torch's CUDA version where both are there; None where none is."""
    found = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    fitting = [name for name in found if name == f"nixl_cu{(torch.version.cuda or '').partition('.')[0]}"]
    return next(iter(fitting + found), None)


class Agent:
    """An agent of `name`, with `memory` for peers to write into."""

    def __init__(self, name: str, memory: Tensor | None = None) -> None:
        """Takes about half a second. Raises ShipmentIncompatible where NIXL is not there or does not start."""
        module = installed()
        if module is None:
            raise ShipmentIncompatible("NIXL is not installed: pip install --no-deps nixl-cu12 (or nixl-cu13)")
        try:
            library = importlib.import_module(module)
            logging.getLogger("nixl").setLevel(logging.WARNING)  # it announces each agent on standard output
            self._agent: Any = library.nixl_agent(name, library.nixl_agent_config(backends=BACKENDS))
            self._memory = memory
            self._registered = None if memory is None else self.register(memory)
            self.metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # each of its errors is a class of its own
            raise ShipmentIncompatible(f"NIXL does not start: {error!r}") from error
        self.name = name

    def close(self) -> None:
        """Ends all its connections: after that no peer writes into its memory."""
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        self._agent = None

    def register(self, memory: Tensor) -> Any:
        """For sending from it, or for peers to write into. Returns what `unregister` wants."""
        kind, device = where_is(memory)
        return self._agent.register_memory([(memory.data_ptr(), memory.numel(), device, "")], kind)

    def unregister(self, registered: Any) -> None:
        self._agent.deregister_memory(registered)

    def add_peer(self, metadata: bytes) -> str:
        """Its name."""
        return _text(self._agent.add_remote_agent(metadata))

    def remove_peer(self, name: str) -> None:
        self._agent.remove_remote_agent(name)

    def write(self, payload: Tensor, peer: str, kind: str, device: int, address: int) -> Any:
        """Begin to write registered `payload` to `address` of a peer's memory. A handle for `is_done` and `release`."""
        own_kind, own_device = where_is(payload)
        own = self._agent.get_xfer_descs([(payload.data_ptr(), payload.numel(), own_device)], own_kind)
        theirs = self._agent.get_xfer_descs([(address, payload.numel(), device)], kind)
        handle = self._agent.initialize_xfer("WRITE", own, theirs, peer)
        if self._agent.transfer(handle) == "ERR":
            raise RuntimeError("NIXL refuses the transfer")
        return handle

    def is_done(self, handle: Any) -> bool:
        """Raises what went wrong; a peer that is frozen is never done."""
        state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise RuntimeError("NIXL reports an error")
        return bool(state == "DONE")

    def release(self, handle: Any) -> None:
        """Raises if it is under way and cannot be aborted."""
        handle.release()

    def notify(self, peer: str, message: bytes) -> None:
        self._agent.send_notif(peer, message)

    def notifications(self) -> list[bytes]:
        """New ones, of all peers."""
        return [message for messages in self._agent.get_new_notifs().values() for message in messages]


def where_is(memory: Tensor) -> tuple[str, int]:
    """(kind, device) as NIXL names them."""
    return ("VRAM", memory.get_device()) if memory.is_cuda else ("DRAM", 0)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
