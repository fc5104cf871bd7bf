"""From sources to a shared library, once per machine: what to build, where it is kept, how it is built.

Knows compilers and files. Does not load what it builds. A library's name carries a hash of everything it is made from,
so a changed source, flag or compiler builds anew and nothing stale is ever loaded. Where there is no compiler, one that
any compiler made from the same sources and flags will do.
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
PREBUILT = Path(__file__).parent / "prebuilt"  # where an image keeps them: it has no compiler
DEFAULT_CACHE = Path("~/.cache/packlight/native").expanduser()
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: infinities and NaN keep their meaning, because masks are made of them.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# Beside the library is where `--prebuilt` puts OpenMP's own: an image has neither compiler nor that.
BESIDE = ("-Wl,-rpath,$ORIGIN",)
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
    """Where the library of `variant`, made by `compiler`, is or will be."""
    made_by = sha256(repr((compiler, _version(compiler))).encode()).hexdigest()
    return cache / f"{_made_from(variant, sanitize)}-{made_by[:8]}.so"


def find_library(variant: Variant, folder: Path, *, sanitize: bool = False) -> Path | None:
    """A library of `variant` in `folder` that was made from these sources and flags, by any compiler."""
    return next(iter(sorted(folder.glob(f"{_made_from(variant, sanitize)}-*.so"))), None)


def build(
    variant: Variant,
    *,
    cache: Path = DEFAULT_CACHE,
    sanitize: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """The library of `variant`: the one that came with the package, or else compiled if it is not in `cache` yet.
    Processes that start at once wait for one of them.

    Raises NativeUnavailable: no compiler, or one that fails, with the end of what it said."""
    came_along = find_library(variant, PREBUILT, sanitize=sanitize)
    if came_along is not None:
        return came_along
    try:
        compiler = find_compiler()
    except NativeUnavailable:
        made_before = find_library(variant, cache, sanitize=sanitize)
        if made_before is None:
            raise
        return made_before
    return compile_into(cache, variant, compiler, sanitize=sanitize, on_progress=on_progress)


def compile_into(
    folder: Path,
    variant: Variant,
    compiler: str,
    *,
    sanitize: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """The library of `variant` in `folder`, compiled if it is not there yet. Raises NativeUnavailable."""
    path = library_path(variant, compiler, folder, sanitize=sanitize)
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                on_progress(f"compiling the {variant.name} kernels (once; kept in {folder})")
                _compile(compiler, _flags(variant, sanitize), path)
    except OSError as error:
        raise NativeUnavailable(f"{folder} cannot hold the compiled kernels: {error}") from None
    return path


def bring_openmp(folder: Path, compiler: str) -> None:
    """Put the OpenMP library that g++ links to into `folder`. With another compiler the machine must have its own."""
    said = subprocess.run(
        [compiler, "-print-file-name=libgomp.so.1"], capture_output=True, text=True, check=False
    ).stdout
    library = Path(said.strip())
    if library.is_absolute():
        shutil.copy(library, folder / library.name)


def _made_from(variant: Variant, sanitize: bool) -> str:
    """The part of a library's name that says what it is."""
    digest = sha256(repr(_flags(variant, sanitize)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    kind = "-sanitized" if sanitize else ""
    return f"libpacklight-{variant.name}{kind}-{digest.hexdigest()[:16]}"


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
        _run([compiler, *flags, *BESIDE, "-shared", *objects, "-o", str(finished)])
        finished.replace(path)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        end = "\n".join(result.stderr.strip().splitlines()[-8:])
        raise NativeUnavailable(f"{command[0]} failed ({result.returncode}) on the native kernels:\n{end}")
