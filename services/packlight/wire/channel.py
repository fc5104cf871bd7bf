"""gRPC channels and servers with the settings that production taught the field.

- keepalive with `ping_timeout_ms`: a frozen peer is otherwise noticed after a minute. Whoever waits for an answer gives
  a silent server up after 3 s; a server, which has nothing to wait for, gives a silent client 10 s: on a machine with
  more work than cores a process that is well may not come to answer for a second or two;
- a server must permit those pings (`min_ping_interval_without_data_ms`; unknown names are ignored without a word), or
  it ends a connection that is quiet for 6 s with GOAWAY;
- an address that does not answer is given up after 2 s instead of 20;
- message sizes are unlimited: flow control and admission bound memory, a prompt or a page must not hit 4 MiB;
- one channel per address, kept while it is asked for: connections are made once. With TLS, until the certificate is
  renewed. A channel to a worker that is gone for good would try to connect about once a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from packlight.core.credentials import CredentialFiles, Credentials
from packlight.core.errors import StartupError
from packlight.wire.security import MembersOnly, channel_credentials, server_credentials

COMMON = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT = [
    *COMMON,
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # despite its name: how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Else a new channel inherits the failures, and the waiting, of an older one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER = [
    *COMMON,
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),
]


RETIREMENT_S = 3600.0
"""How long calls may go on over a channel that is no longer kept."""

UNUSED_S = 600.0
"""How long a channel is kept that nobody asks for."""


class Dialer:
    """Opens channels as the process is configured: in the clear, or with what `tls` has now."""

    def __init__(self, tls: CredentialFiles | None = None) -> None:
        self._tls = tls

    def open(self, address: str) -> grpc.aio.Channel:
        """Connects with the first call."""
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=CLIENT)
        # Certificates name the fleet, not the host: see `wire/security.py`.
        options = [*CLIENT, ("grpc.ssl_target_name_override", self._tls.name)]
        return grpc.aio.secure_channel(address, channel_credentials(self._tls.current()), options=options)

    @property
    def certificate(self) -> Credentials | None:
        """What a channel opened now would show: another object than before after a renewal."""
        return self._tls.current() if self._tls else None


@dataclass(slots=True)
class _Kept:
    channel: grpc.aio.Channel
    certificate: Credentials | None
    asked_s: float


class Channels:
    """The channels of one process, by address. Create it on the event loop."""

    def __init__(self, dialer: Dialer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._dialer, self._clock = dialer or Dialer(), clock
        self._kept: dict[str, _Kept] = {}
        self._retired: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """One that shows the present certificate: an older one could not connect again once it has expired."""
        now, certificate, kept = self._clock(), self._dialer.certificate, self._kept.get(address)
        if kept is None or kept.certificate is not certificate:
            if kept is not None:
                self._retire(kept.channel)
            kept = self._kept[address] = _Kept(self._dialer.open(address), certificate, now)
        kept.asked_s = now
        for unused in [one for one, other in self._kept.items() if now - other.asked_s > UNUSED_S]:
            self._retire(self._kept.pop(unused).channel)
        return kept.channel

    async def close(self) -> None:
        for task in self._retired.values():
            task.cancel()
        for channel in (*self._retired, *(kept.channel for kept in self._kept.values())):
            await channel.close()
        self._retired.clear()
        self._kept.clear()

    def _retire(self, channel: grpc.aio.Channel) -> None:
        task = self._retired[channel] = asyncio.create_task(channel.close(RETIREMENT_S))
        task.add_done_callback(lambda _: self._retired.pop(channel, None))


async def start_server(
    handlers: list[grpc.GenericRpcHandler], host: str, port: int, tls: CredentialFiles | None = None
) -> tuple[grpc.aio.Server, int]:
    """A listening server and its port; with `tls`, for members of the fleet alone. Raises StartupError if the address
    cannot be had."""
    server = grpc.aio.server(options=SERVER, interceptors=[MembersOnly(tls.name)] if tls else None)
    server.add_generic_rpc_handlers(tuple(handlers))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, server_credentials(tls))
    except RuntimeError:  # it says no more than that
        raise StartupError(
            f"cannot listen on {host}:{port}: another process has the port, or the host is not ours"
        ) from None
    await server.start()
    return server, bound
