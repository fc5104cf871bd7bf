"""Running Lua scripts on a Redis or Valkey server that may be slow, frozen, restarting or gone.

Knows redis-py and its traps. Does not know what the scripts do. Nothing here is worth waiting for: every call ends
within `timeout_s`, with a reply or with RedisAway; after a failure calls end at once until the breaker lets one try.

What redis-py is told, and why:
  - no retries: its default of ten makes a call to a dead server take 4 s;
  - one deadline around the whole call (connecting, sending, receiving) in place of its per-step time-outs, which add
    up. A connection that is cut off in mid-command is closed by redis-py, so a late reply can reach nobody else;
  - RESP2: no `HELLO` round trip on connecting, and no push messages.
The deadline covers connecting, so a server that is several milliseconds and a TLS handshake away needs a larger one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from packlight.core.errors import ConfigError
from packlight.redis_link.breaker import Breaker
from packlight.redis_link.script import Script
from packlight.redis_link.tls import TlsConnection, shared_context

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4
"""One event loop cannot keep more busy: its own work on a call is as long as the wait for the reply."""


class RedisAway(Exception):
    """No reply this time. Callers turn it into their own answer (a miss, the last known state): users never see it."""


def redis_url(configured: str | None, environ: Mapping[str, str], needed_by: str, settings: str) -> str:
    """The server's address. Raises ConfigError if there is none; `settings` says what else could be set."""
    url = configured or environ.get("REDIS_URL")
    if not url:
        raise ConfigError(
            f"{needed_by} needs the address of a Redis or Valkey server: set REDIS_URL (for example "
            f"redis://localhost:6379/0){settings}"
        )
    return url


class RedisLink:
    """A bounded pool of connections to one server, behind a breaker.

    `timeout_s` bounds a call, `cooldown_s` is how long a failed server is left alone. `clock` is monotonic, in seconds.
    Raises ConfigError if `url` is not a Redis address.
    """

    def __init__(self, url: str, *, timeout_s: float, cooldown_s: float, clock: Callable[[], float]) -> None:
        self._client = _client(url, timeout_s)
        self._timeout_s = timeout_s
        self._cooldown_s = cooldown_s
        self._breaker = Breaker(cooldown_s, clock)
        # redis-py raises when its pool is empty; a short queue of our own is what a burst of requests wants instead.
        self._free_connections = asyncio.Semaphore(MAX_CONNECTIONS)

    @property
    def available(self) -> bool:
        """Whether the last call that said anything about the server succeeded."""
        return not self._breaker.is_open

    @property
    def num_heals(self) -> int:
        """Grows each time the server came back: what it was told before may have been lost meanwhile."""
        return self._breaker.num_heals

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """The script's reply (RESP2 types, bytes). Raises RedisAway if there is none within the deadline."""
        if not self._breaker.allow():
            raise RedisAway("left alone after a failure")
        was_available = self.available
        try:
            reply = await self._judge(script, keys, args)
        except RedisAway as reason:
            if was_available and not self.available:
                log.warning("redis is away (%s): going on without it, next try in %.1f s", reason, self._cooldown_s)
                await self._drop_idle_connections()
            raise
        if not was_available:
            log.info("redis is back")
        return reply

    async def close(self) -> None:
        with suppress(RedisError, OSError):
            await self._client.aclose()

    async def _judge(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run the script within the deadline, and tell the breaker what that says about the server."""
        loop = asyncio.get_running_loop()
        sent_at = None
        try:
            async with asyncio.timeout(self._timeout_s), self._free_connections:
                sent_at = loop.time()
                reply = await self._evaluate(script, keys, args)
        except TimeoutError:
            if sent_at is not None and self._is_servers_fault(loop.time() - sent_at):
                self._breaker.strike()
            else:
                self._breaker.abandon()
            raise RedisAway(f"no reply within {self._timeout_s * 1000:.0f} ms") from None
        except (RedisError, OSError) as error:
            self._breaker.fail()
            raise RedisAway(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self._breaker.abandon()
            raise
        self._breaker.succeed()
        return reply

    async def _evaluate(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        command = (len(keys), *keys, *args)
        try:
            return await self._client.execute_command("EVALSHA", script.sha, *command)
        except NoScriptError:
            # A server that restarted or was told SCRIPT FLUSH. EVAL runs the script and makes it known again.
            return await self._client.execute_command("EVAL", script.text, *command)

    def _is_servers_fault(self, waited_s: float) -> bool:
        """Whether a call that got no reply says anything about the server: not if it had queued for a connection most
        of its time, nor if this process was too busy to look in time."""
        return self._timeout_s / 2 < waited_s < 2 * self._timeout_s

    async def _drop_idle_connections(self) -> None:
        """After a failover they still lead to the demoted server (READONLY), after a cut network nowhere: the next try
        must not inherit one. Those in use come back with a failure of their own."""
        with suppress(RedisError, OSError):
            await self._client.connection_pool.disconnect(inuse_connections=False)


def _client(url: str, timeout_s: float) -> Redis:
    """Messages do not repeat the address, which may hold a password."""
    try:
        settings = parse_url(url)
        if settings.get("connection_class") is SSLConnection:
            settings |= {"connection_class": TlsConnection, "shared_context": shared_context(settings)}
    except ValueError as error:
        raise ConfigError(f"the Redis address is not usable: {error}") from None
    except (OSError, RedisError, TypeError) as error:
        raise ConfigError(f"a TLS setting of the Redis address is not usable (ssl_ca_certs, ...): {error}") from None
    mine = {"protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": None, "socket_connect_timeout": timeout_s}
    return Redis.from_pool(ConnectionPool(**{**mine, **settings}))
