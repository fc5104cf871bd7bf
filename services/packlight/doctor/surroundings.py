"""What is around the process: Redis, and the ports it wants to listen on.

redis-py is imported by its check only: it takes a tenth of a second, for which `packlight --help` should not wait.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packlight.core.errors import ConfigError
from packlight.doctor.base import Finding, Level, Patient, missing, ok, unused

if TYPE_CHECKING:
    from redis import Redis

_TIMEOUT_S = 2.0


def check_redis(patient: Patient) -> Finding:
    """Redis answers PING and runs a script, which is all that is asked of it."""
    users = [name for name in ("index", "fleet") if getattr(patient.config, name).backend == "redis"]
    if not patient.is_fleet:
        return unused("`serve` keeps index and fleet in memory")
    if not users:
        return missing(
            f"index and fleet are in memory, so no other process sees this {patient.role}",
            "--set index.backend=redis --set fleet.backend=redis, and REDIS_URL",
        )
    from packlight.redis_link.link import redis_url

    # The registry's address comes from the environment alone.
    configured = {"index": patient.config.index.redis_url, "fleet": None}
    try:
        urls = {redis_url(configured[user], patient.environ, f"{user}.backend=redis", "") for user in users}
    except ConfigError as error:
        return missing(error.message, "export REDIS_URL=redis://host:6379/0")
    found = [_asked(url) for url in sorted(urls)]
    return next((one for one in found if one.level is not Level.OK), found[0])


def check_ports(patient: Patient) -> Finding:
    """Every port that the role listens on is free. 0 is whichever is."""
    wanted, taken = [], []
    for setting, host, port in _ports(patient):
        wanted.append(f"{setting} {port}")
        if reason := _why_taken(host, port):
            taken.append(f"{setting} {host}:{port} ({reason})")
    if taken:
        return missing(", ".join(taken), "end what listens there, or choose another: --set SETTING=PORT")
    return ok(", ".join(wanted) or "any free ones")


def _asked(url: str) -> Finding:
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError, ResponseError
    from redis.retry import Retry

    place = _place(url)
    try:
        client = Redis.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        return missing(f"the address is not usable: {error}", "use redis://host:6379/0, or rediss:// for TLS")
    with closing(client):
        try:
            client.ping()
            version = client.eval("return redis.call('PING') and 1", 0) and _version(client)
        except ResponseError as error:
            return missing(f"{place} answers, but not everything: {error}", "its ACL must allow PING, EVAL and EVALSHA")
        except (RedisError, OSError) as error:
            return missing(f"{place} cannot be reached: {error}", "start it, or correct REDIS_URL")
    return ok(f"{place} answers and runs scripts{version}")


def _version(client: Redis) -> str:
    """For the eye; a server that keeps INFO to itself is as good."""
    from redis.exceptions import RedisError

    try:
        info = client.info("server")
    except RedisError:
        return ""
    return f" ({info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')})"


def _place(url: str) -> str:
    """The address without its password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path


def _ports(patient: Patient) -> Iterator[tuple[str, str, int]]:
    """(setting, host, port) of every port that is fixed by the configuration."""
    router = patient.config.router
    if patient.role in ("serve", "router") and router.port:
        yield "router.port", router.host, router.port
    for name, section in patient.sections.items() if patient.is_fleet else ():
        for setting, port in (("port", section.port), ("metrics_port", section.metrics_port)):
            if port:
                yield f"{name}.{setting}", section.host, port


def _why_taken(host: str, port: int) -> str:
    """Why the port cannot be listened on, or nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
