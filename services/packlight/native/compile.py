"""From sources to a shared library, once per machine: what to build, where it is kept, how it is built.

Knows compilers and files. Does not load what it builds. A library's name carries a hash of everything it is made from,
so a changed source, flag or compiler builds anew and nothing stale is ever loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from packlight.core.errors import StartupError
from packlight.native.variants import Variant

SOURCES = Path(__file__).parent / "src"
DEFAULT_CACHE = Path("~/.cache/packlight/native").expanduser()
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: infinities and NaN keep their meaning, because masks are made of them.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")


class NativeUnavailable(StartupError):
    """The compiled kernels cannot be had on this machine. The message says why, and what would help."""


def find_compiler() -> str:
    """Raises NativeUnavailable."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NativeUnavailable(f"no C++ compiler ({', '.join(COMPILERS)}) on PATH: install one, for example g++")


def library_path(variant: Variant, compiler: str, cache: Path = DEFAULT_CACHE, *, sanitize: bool = False) -> Path:
    """Where the library of `variant` is or will be."""
    digest = sha256(repr((compiler, _version(compiler), _flags(variant, sanitize))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    kind = "-sanitized" if sanitize else ""
    return cache / f"libpacklight-{variant.name}{kind}-{digest.hexdigest()[:16]}.so"


def build(
    variant: Variant,
    *,
    cache: Path = DEFAULT_CACHE,
    sanitize: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """The library of `variant`, compiled if it is not there yet. Processes that start at once wait for one of them.

    Raises NativeUnavailable: no compiler, or one that fails, with the end of what it said."""
    compiler = find_compiler()
    path = library_path(variant, compiler, cache, sanitize=sanitize)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                on_progress(f"compiling the {variant.name} kernels (once; kept in {cache})")
                _compile(compiler, _flags(variant, sanitize), path)
    except OSError as error:
        raise NativeUnavailable(f"{cache} cannot hold the compiled kernels: {error}") from None
    return path


def _flags(variant: Variant, sanitize: bool) -> tuple[str, ...]:
    level = f"-DPACKLIGHT_LEVEL={variant.level}"
    return (*FLAGS, *(SANITIZE if sanitize else ()), *variant.compiler_flags, level)


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Each source on its own, as many at a time as there are cores; the result appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(folder, source.stem + ".o")) for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        finished = Path(folder, "finished.so")
        _run([compiler, *flags, "-shared", *objects, "-o", str(finished)])
        finished.replace(path)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        end = "\n".join(result.stderr.strip().splitlines()[-8:])
        raise NativeUnavailable(f"{command[0]} failed ({result.returncode}) on the native kernels:\n{end}")
