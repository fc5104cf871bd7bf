"""TLS to a Redis or Valkey server, for an event loop that must not be held up by it.

Knows redis-py's TLS settings, which stand in the address (`rediss://...?ssl_ca_certs=...`), and when their files
change.

redis-py makes a TLS context for each connection, when it connects. Reading the system's CAs for it takes a tenth of a
second, during which the event loop stands still: longer than the prefix index may take in all. So all connections of a
link share one context, which is made with the link.
"""

from __future__ import annotations

import ssl
from typing import Any

from redis.asyncio.connection import RedisSSLContext, SSLConnection

from packlight.core.credentials import Stamp, stamp_of


class SharedContext(RedisSSLContext):  # type: ignore[misc]  # redis-py has no types here
    """Made anew when the files of the address have changed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._stamp: Stamp | None = None

    def get(self) -> ssl.SSLContext:
        """Raises OSError (ssl's errors are of that kind) if a file cannot be used."""
        stamp = stamp_of(path for path in (self.ca_certs, self.certfile, self.keyfile) if path)
        if stamp != self._stamp:
            self.context = None
        context: ssl.SSLContext = super().get()
        self._stamp = stamp
        return context


class TlsConnection(SSLConnection):  # type: ignore[misc]
    def __init__(self, *, shared_context: SharedContext, **settings: Any) -> None:
        super().__init__(**settings)
        self.ssl_context = shared_context


def shared_context(settings: dict[str, Any]) -> SharedContext:
    """Of an address's settings (`ssl_ca_certs`, ...). The server's name is checked unless they say otherwise. Raises
    OSError if a file cannot be used."""
    own = {name.removeprefix("ssl_"): value for name, value in settings.items() if name.startswith("ssl_")}
    context = SharedContext(**{"cert_reqs": "required", "check_hostname": True, **own})
    context.get()
    return context
