"""The KV transports by name. `grpc` is the inline transport: its frames ride in the gRPC stream."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.core.errors import ShipmentIncompatible
from packlight.core.registry import Registry
from packlight.transfer.base import KVTransport

TRANSPORTS = Registry(
    "KV transport",
    {
        "inproc": "packlight.transfer.inproc:InprocTransport",
        "grpc": "packlight.transfer.inline:InlineTransport",
    },
)


def build_transport(name: str) -> KVTransport:
    transport: KVTransport = TRANSPORTS.load(name)()
    return transport


def choose(wanted: Sequence[str], offered: Sequence[str]) -> str:
    """The first transport of `wanted` that is `offered`, or ShipmentIncompatible naming both lists."""
    for name in wanted:
        if name in offered:
            return name
    raise ShipmentIncompatible(
        f"no common KV transport: the decode worker takes {', '.join(wanted)}, prefill offers {', '.join(offered)}"
    )
