"""gRPC channels and servers with the settings that production taught the field.

- keepalive with `ping_timeout_ms`: a frozen peer is otherwise noticed after a minute (tried; 1.7 s with these);
- a server must permit those pings (`min_ping_interval_without_data_ms`; unknown names are ignored without a word), or
  it ends a connection that is quiet for 6 s with GOAWAY;
- an address that does not answer is given up after 2 s instead of 20;
- message sizes are unlimited: flow control and admission bound memory, a prompt or a page must not hit 4 MiB;
- one channel per address, kept: connections are made once.
"""

from __future__ import annotations

import grpc

from packlight.core.errors import StartupError

COMMON = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT = [
    *COMMON,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # despite its name: how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Else a new channel inherits the failures, and the waiting, of an older one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER = [*COMMON, ("grpc.http2.min_ping_interval_without_data_ms", 500), ("grpc.so_reuseport", 0)]


def open_channel(address: str) -> grpc.aio.Channel:
    """Connects with the first call."""
    return grpc.aio.insecure_channel(address, options=CLIENT)


class Channels:
    """The channels of one process, by address."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


async def start_server(handlers: list[grpc.GenericRpcHandler], host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """A listening server and its port. Raises StartupError if the address cannot be had."""
    server = grpc.aio.server(options=SERVER)
    server.add_generic_rpc_handlers(tuple(handlers))
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:  # it says no more than that
        raise StartupError(
            f"cannot listen on {host}:{port}: another process has the port, or the host is not ours"
        ) from None
    await server.start()
    return server, bound
