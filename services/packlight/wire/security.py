"""Mutual TLS between the processes of a fleet: credentials as gRPC wants them, and who may call.

Knows credentials, and the name that makes a certificate the fleet's. Does not know files (`core/credentials.py`).

A worker is reached at a pod's address, which no certificate could name. So neither end looks at hosts: a peer is a
member of the fleet if `ca` vouches for it and its certificate has the fleet's name among its DNS names. Clients check
that in the handshake, in place of the host. Servers can only check `ca` there, and look at the name when a call comes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from packlight.core.credentials import CredentialFiles, Credentials

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)


def server_credentials(files: CredentialFiles) -> grpc.ServerCredentials:
    """They follow the files: each handshake asks for what is new."""
    first = files.current()
    return grpc.dynamic_ssl_server_credentials(_configuration(first), _Renewal(files, first), True)


class _Renewal:
    """What gRPC asks before each handshake, from a thread of its own: None is nothing new."""

    def __init__(self, files: CredentialFiles, told: Credentials) -> None:
        self._files, self._told = files, told

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        credentials = self._files.current()
        if credentials is self._told:
            return None
        self._told = credentials
        return _configuration(credentials)


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (credentials.key, credentials.certificate)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=credentials.ca)


class MembersOnly(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses calls from certificates that have not `name` among their DNS names: the CA may have issued others."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        inner = {kind: behaviour for kind in _KINDS if (behaviour := getattr(handler, kind)) is not None}
        return handler._replace(**{kind: self._guarded(behaviour) for kind, behaviour in inner.items()})

    def _guarded(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._name not in context.auth_context().get("peer_dns", ()):
                name = self._name.decode()
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"your certificate is not for {name!r}")
            return await behaviour(request, context)

        return guarded
