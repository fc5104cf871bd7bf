"""Who may use the API: the keys of a file, one a line.

Knows the file and the `Authorization` header. Keys are kept and compared as digests, so neither memory dumps nor the
time a comparison takes tell them. Does not know who a key belongs to: limits and accounts are a gateway's business.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from packlight.core.errors import ConfigError, Unauthorized

log = logging.getLogger(__name__)

RECHECK_S = 5.0
"""A file that was changed is read again within this time: keys come and go without a restart."""
MIN_KEY_LENGTH = 16

_MISSING = "No API key was sent. Send it as the header 'Authorization: Bearer <key>'."
_WRONG = "This API key is not known here."


class ApiKeys:
    """The keys of `path`. Empty lines and lines that begin with `#` are passed over."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the file cannot be read, has no key, or one that is too short."""
        self._path, self._clock = path, clock
        self._digests, self._changed_at, self._checked_at = _read(path), _mtime(path), clock()

    def check(self, authorization: str | None) -> None:
        """Raises Unauthorized unless the header's value carries a key of the file."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized(_MISSING)
        self._refresh()
        if _digest(key.strip()) not in self._digests:
            raise Unauthorized(_WRONG)

    def _refresh(self) -> None:
        """Follow changes of the file. One that cannot be used leaves the keys as they were, and is said once."""
        if self._clock() - self._checked_at < RECHECK_S:
            return
        self._checked_at, changed_at = self._clock(), _mtime(self._path)
        if changed_at == self._changed_at:
            return
        self._changed_at = changed_at
        try:
            self._digests = _read(self._path)
            log.info("%d API keys read from %s", len(self._digests), self._path)
        except ConfigError as error:
            log.error("%s; the keys stay as they were", error.message)


class ApiKeyMiddleware:
    """Asks for a key everywhere but under `open_paths`: probes, metrics and pages without data."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        open_paths: tuple[str, ...],
        on_refused: Callable[[str], None] = lambda error: None,
    ) -> None:
        """A path of `open_paths` that ends with `/` opens everything below it, others just themselves. `on_refused`
        gets the error's class name."""
        self._app, self._keys, self._open_paths, self._on_refused = app, keys, open_paths, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            try:
                self._keys.check(Headers(scope=scope).get("authorization"))
            except Unauthorized as error:
                self._on_refused(type(error).__name__)
                raise
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return any(
            path == one or (one.endswith("/") and one != "/" and path.startswith(one)) for one in self._open_paths
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _mtime(path: Path) -> int:
    """0 if it is gone. Of what a link leads to: Kubernetes swaps the link when a secret changes."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> frozenset[bytes]:
    setting = f"router.api_keys_file {str(path)!r}"
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot be read: {error}") from None
    keys = [(at, line) for at, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{setting}: it has no key; write one a line, for example from `openssl rand -hex 32`")
    for at, key in keys:
        if len(key) < MIN_KEY_LENGTH or any(character.isspace() for character in key):
            wanted = f"a key has {MIN_KEY_LENGTH} characters at least and no space"
            raise ConfigError(f"{setting}, line {at}: {wanted}, this has {len(key)}")
        if not key.isascii():
            raise ConfigError(f"{setting}, line {at}: a header cannot carry this key; write it in ASCII")
    return frozenset(_digest(key) for _, key in keys)
