"""Certificates for tests, in files named as Kubernetes names those of a TLS secret."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from packlight.core.config import TlsConfig
from packlight.core.credentials import CredentialFiles

NAME = "packlight"
CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
FILES = {"ca": CA, "cert": CERTIFICATE, "key": KEY}  # by setting


@dataclass(frozen=True)
class Authority:
    """A CA that issues into `folder`."""

    folder: Path
    ca: trustme.CA

    @property
    def config(self) -> TlsConfig:
        return TlsConfig(**{setting: str(self.folder / name) for setting, name in FILES.items()})

    @property
    def settings(self) -> tuple[str, ...]:
        """For `--set`."""
        return tuple(f"tls.{setting}={self.folder / name}" for setting, name in FILES.items())

    def issue(self, *names: str, ca: bytes | None = None, **validity: datetime) -> None:
        """A new certificate in place of the old, for `packlight` if no `names` are given; `not_before`, `not_after`.
        With `ca`, that is trusted."""
        self.write(self.ca.issue_cert(*(names or (NAME,)), **validity), ca)

    def write(self, certificate: trustme.LeafCert, ca: bytes | None = None) -> None:
        texts = {
            CA: ca or self.ca.cert_pem.bytes(),
            CERTIFICATE: b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
            KEY: certificate.private_key_pem.bytes(),
        }
        for name, text in texts.items():
            replace(self.folder / name, text)


def authority(folder: Path, ca: trustme.CA | None = None) -> Authority:
    """A CA, another for each call, and a certificate by it in `folder`."""
    folder.mkdir(exist_ok=True)
    made = Authority(folder, ca or trustme.CA())
    made.issue()
    return made


def replace(path: Path, text: bytes) -> None:
    """At once, as whoever renews certificates does."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(text)
    beside.rename(path)


def in_days(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


@contextmanager
def fleet_credentials() -> Iterator[CredentialFiles]:
    """What the processes of a fleet have in common, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="packlight-tls-") as folder:
        made = authority(Path(folder))
        yield CredentialFiles(made.config)
