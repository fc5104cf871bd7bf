"""The KV transports by name, and how two workers agree on one.

`grpc` is the inline transport: its frames ride in the gRPC stream. A decode worker asks for transports by name, best
first; where one has an offer, it stands behind the name and a `:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from packlight.core.errors import ShipmentIncompatible
from packlight.core.registry import Registry
from packlight.transfer.base import KVReceiver, KVSender, KVTransport, Site

TRANSPORTS = Registry(
    "KV transport",
    {
        "inproc": "packlight.transfer.inproc:InprocTransport",
        "shm": "packlight.transfer.shm:ShmTransport",
        "process_group": "packlight.transfer.process_group:ProcessGroupTransport",
        "nixl": "packlight.transfer.nixl:NixlTransport",
        "grpc": "packlight.transfer.inline:InlineTransport",
    },
)


def build_transport(name: str, site: Site | None = None) -> KVTransport:
    """Listens, and makes links, only when it is used. Without a `site` it does so for this host alone."""
    transport: KVTransport = TRANSPORTS.load(name)(site)
    return transport


def wish(name: str, receiver: KVReceiver) -> str:
    """How a request asks for `receiver`."""
    return f"{name}:{receiver.offer}" if receiver.offer else name


def connect(wanted: Sequence[str], transports: Mapping[str, KVTransport]) -> tuple[str, KVSender]:
    """The first of `wanted` that reaches its receiver: its name and the sender, to be released.

    Raises ShipmentIncompatible naming both lists, and why what both know does not do."""
    reasons = []
    for name, _, offer in (entry.partition(":") for entry in wanted):
        if name in transports:
            try:
                return name, transports[name].sender(offer)
            except ShipmentIncompatible as error:
                reasons.append(f"; {name}: {error}")
    names = ", ".join(entry.partition(":")[0] for entry in wanted)
    raise ShipmentIncompatible(
        f"no common KV transport: the decode worker takes {names}, prefill offers {', '.join(transports)}"
        + "".join(reasons)
    )
