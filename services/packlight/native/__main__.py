"""`python -m packlight.native`: compile the kernels beforehand. For `make setup` and for images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from packlight.native.compile import (
    DEFAULT_CACHE,
    PREBUILT,
    NativeUnavailable,
    bring_openmp,
    compile_into,
    find_compiler,
)
from packlight.native.variants import VARIANTS, Variant, cpu_flags, supported


def main() -> int:
    """0 if at least one variant is there now; without a compiler 1, and the server does without the kernels."""
    parser = argparse.ArgumentParser(prog="python -m packlight.native", description="Compile the CPU kernels.")
    parser.add_argument("--all", action="store_true", help="every variant, also those that this CPU cannot run")
    parser.add_argument(
        "--prebuilt", action="store_true", help="into the package itself, where they are found without a compiler"
    )
    arguments = parser.parse_args()
    variants = VARIANTS if arguments.all else supported(cpu_flags())[:1]
    try:
        compiler = find_compiler()
    except NativeUnavailable as error:
        print(f"no native kernels: {error.message}", file=sys.stderr)
        return 1
    folder = PREBUILT if arguments.prebuilt else DEFAULT_CACHE
    made = [_make(variant, compiler, folder) for variant in variants]
    if arguments.prebuilt and any(made):
        bring_openmp(folder, compiler)
    return 0 if any(made) else 1


def _make(variant: Variant, compiler: str, folder: Path) -> bool:
    """A compiler too old for a variant's instructions, or of another machine, costs that variant."""
    try:
        print(f"{variant.name}: {compile_into(folder, variant, compiler)}")
    except NativeUnavailable as error:
        print(f"{variant.name}: {error.message}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
