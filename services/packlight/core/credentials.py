"""What a process shows the others of its fleet, and what it accepts of them: a CA, a certificate and its key.

Knows three PEM files, when they change, and whether they fit together. Does not know gRPC (`wire/security.py`).

Whether they fit is tried rather than reasoned about: the process shakes hands with itself in memory, as both ends of a
connection (RFC 8446). That shows at once that the key is the certificate's, that the CA vouches for it as a server's
and as a client's, that it is valid now, and that it has the fleet's name.
"""

from __future__ import annotations

import binascii
import logging
import os
import re
import ssl
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from packlight.core.config import TlsConfig
from packlight.core.errors import ConfigError

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int] | None, ...]

_NUM_READS = 3
_HINTS: Mapping[int, str] = MappingProxyType(
    {
        9: "Look at this machine's clock",
        10: "Issue it, or the CA, anew",
        18: "Give tls.ca the CA that issued it",
        19: "Give tls.ca the CA that issued it, and tls.cert what is between the two",
        20: "Give tls.ca the CA that issued it, and tls.cert what is between the two",
        21: "Give tls.ca the CA that issued it, and tls.cert what is between the two",
        26: "Its extended key usage must have serverAuth and clientAuth, or not be there",
    }
)
"""What to do, by OpenSSL's verification code (x509_vfy.h)."""
_NAME_MISMATCH = 62
_FOREIGN_KEYS: Mapping[str, bytes] = MappingProxyType(
    {"an Ed25519": bytes.fromhex("06032b6570"), "a P-521": bytes.fromhex("06052b81040023")}
)
"""Keys that OpenSSL would take and gRPC's TLS does not, by their object identifier in DER (RFC 8410, RFC 5480). Of the
other end one hears no more than that it hung up."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM texts that fit together; the validity of the certificate in Unix seconds."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    valid_from: float
    valid_until: float


def read_credentials(config: TlsConfig) -> Credentials:
    """Raises ConfigError naming the file, what is wrong with it, and what to do."""
    paths = _paths(config)
    for _ in range(_NUM_READS):
        stamp = stamp_of(paths.values())
        ca, certificate, key = (_read(setting, path) for setting, path in paths.items())
        valid_from, valid_until = _rehearse(paths, config.name)
        if stamp_of(paths.values()) == stamp:  # else the three may be of two issues
            return Credentials(ca, certificate, key, valid_from, valid_until)
    raise ConfigError(f"{', '.join(paths.values())}: they change as fast as they are read. Try again")


class CredentialFiles:
    """The credentials of one process, followed as their files change: certificates are renewed without a restart.

    Safe to use from several threads: gRPC asks from its own."""

    def __init__(self, config: TlsConfig) -> None:
        """Raises ConfigError as `read_credentials` does."""
        self.name = config.name
        self._config, self._paths, self._lock = config, tuple(_paths(config).values()), threading.Lock()
        self._stamp = stamp_of(self._paths)
        self._credentials = read_credentials(config)

    def current(self) -> Credentials:
        """The same object for as long as the files are the same. Files that cannot be used leave it as it was, and are
        complained of once."""
        with self._lock:
            stamp = stamp_of(self._paths)
            if stamp != self._stamp:
                self._stamp = stamp
                self._renew()
            return self._credentials

    def valid_until(self) -> float:
        """Unix seconds: when the current certificate ends."""
        return self.current().valid_until

    def _renew(self) -> None:
        try:
            self._credentials = read_credentials(self._config)
            log.info("certificate renewed, valid until %s", date_of(self._credentials.valid_until))
        except ConfigError as error:
            until = date_of(self._credentials.valid_until)
            log.error("%s; the certificate stays as it was, valid until %s", error.message, until)


def open_credentials(config: TlsConfig) -> CredentialFiles | None:
    """None where TLS is off. Raises ConfigError as `read_credentials` does."""
    return CredentialFiles(config) if config.is_on else None


def stamp_of(paths: Iterable[str]) -> Stamp:
    """Changes when one of the files does: is replaced, written to, or gone. Links are followed, as Kubernetes changes
    a volume by turning one."""
    return tuple(_stamp(path) for path in paths)


def date_of(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _paths(config: TlsConfig) -> dict[str, str]:
    files = {"tls.ca": config.ca, "tls.cert": config.cert, "tls.key": config.key}
    return {setting: path for setting, path in files.items() if path is not None}


def _read(setting: str, path: str) -> bytes:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}. Give the path of a PEM file") from None
    wanted = b"PRIVATE KEY-----" if setting == "tls.key" else b"-----BEGIN CERTIFICATE-----"
    if wanted not in text:
        raise ConfigError(f"{setting} {path}: no {wanted.decode().strip('-').lower()} in it. A PEM file is expected")
    if setting == "tls.key" and b"ENCRYPTED" in text:
        raise ConfigError(f"{setting} {path}: it is encrypted, and nobody is there to ask. Give it without a password")
    if setting == "tls.key" and (kind := _foreign_kind(text)):
        raise ConfigError(f"{setting} {path}: it is {kind} key, which gRPC does not take. Issue RSA, P-256 or P-384")
    return text


def _foreign_kind(key: bytes) -> str | None:
    try:
        blocks = [binascii.a2b_base64(block) for block in re.findall(rb"-----BEGIN [^-]+-----([^-]+)-----END", key)]
    except binascii.Error:
        return None  # OpenSSL says more about it
    return next((kind for kind, oid in _FOREIGN_KEYS.items() if any(oid in block for block in blocks)), None)


def _rehearse(paths: Mapping[str, str], name: str) -> tuple[float, float]:
    """The validity of the certificate, after a handshake between two ends that have the same three files."""
    ca, cert, key = paths.values()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.verify_mode, client.hostname_checks_common_name = ssl.CERT_REQUIRED, False
    try:
        for end in (server, client):
            end.load_cert_chain(cert, key)
            end.load_verify_locations(ca)
        shown = _shake_hands(server, client, name)
    except OSError as error:  # ssl's own are of that kind
        raise ConfigError(_explain(error, paths, name)) from None
    return ssl.cert_time_to_seconds(shown["notBefore"]), ssl.cert_time_to_seconds(shown["notAfter"])


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> dict[str, Any]:
    """The server's certificate as the client sees it. Raises SSLError where one end does not accept the other."""
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        asking := client.wrap_bio(downward, upward, server_hostname=name),
        server.wrap_bio(upward, downward, server_side=True),
    ]
    while ends:
        for end in ends.copy():
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
                ends.remove(end)
    return asking.getpeercert() or {}


def _explain(error: OSError, paths: Mapping[str, str], name: str) -> str:
    ca, cert, key = (f"{setting} {path}" for setting, path in paths.items())
    reason = getattr(error, "reason", error.strerror)
    if reason == "KEY_VALUES_MISMATCH":
        return f"{key}: it is not the key of {cert}. Give the one that the certificate was issued for"
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"{ca}, {cert} and {key} cannot be used: {reason}. PEM files are expected"
    if error.verify_code == _NAME_MISMATCH:
        return f"{cert}: it is not for {name!r}. Issue one with this among its DNS names, or change tls.name"
    hint = _HINTS.get(error.verify_code, "Issue another")
    return f"{cert} is not accepted with {ca}: {error.verify_message}. {hint}"
