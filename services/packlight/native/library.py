"""The loaded kernels: finding, building and opening the best library this machine can run.

Knows ctypes and addresses, no tensors. What each function takes is declared in the module of its kernel
(`native/stream.py`, ...), which is also where Python's side of its argument struct stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packlight.native.compile import DEFAULT_CACHE, PREBUILT, NativeUnavailable, build, find_compiler, find_library
from packlight.native.variants import Variant, cpu_flags, supported


@dataclass(frozen=True, slots=True)
class Library:
    """One loaded library. Loading it twice is loading it once: the system keeps libraries by path."""

    variant: Variant
    functions: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """`variant` is the best that this CPU runs, `path` its library if there is one by now. `compiler` makes it
    otherwise; without either `reason` says why there are no kernels."""

    variant: Variant
    path: Path | None
    compiler: str | None
    reason: str | None


def status(*, cache: Path = DEFAULT_CACHE) -> NativeStatus:
    """What `open_library` would do, nothing compiled and nothing loaded."""
    best = supported(cpu_flags())[0]
    path = find_library(best, PREBUILT) or find_library(best, cache)
    try:
        return NativeStatus(best, path, find_compiler(), None)
    except NativeUnavailable as error:
        return NativeStatus(best, path, None, None if path else error.message)


def open_library(
    variant: Variant | None = None,
    *,
    cache: Path = DEFAULT_CACHE,
    sanitize: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Library:
    """The kernels, compiled if need be: `variant`, or the best that the CPU supports.

    A compiler too old for a variant's instructions costs only that variant. Raises NativeUnavailable."""
    candidates = (variant,) if variant is not None else supported(cpu_flags())
    for candidate in candidates:
        try:
            path = build(candidate, cache=cache, sanitize=sanitize, on_progress=on_progress)
            return Library(candidate, ctypes.CDLL(str(path)))
        except NativeUnavailable:
            if candidate is candidates[-1]:
                raise
        except OSError as error:  # built, and yet cannot be loaded: a missing libgomp, a cache mounted noexec
            raise NativeUnavailable(f"the compiled kernels cannot be loaded: {error}") from None
    raise AssertionError("there is always the portable variant")
