"""Instruction sets: which forms of the kernels there are, and which of them this CPU runs.

Knows flags and names. Each form is the same sources compiled into a library of its own, so a process loads one and
nothing is dispatched per call. The portable form is plain C++ for any machine; on Arm the compiler turns it to NEON.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni")
_AMX = (*_AVX512_BF16, "amx_tile", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Variant:
    """`cpu_flags` as /proc/cpuinfo spells them. `level` orders variants; sources compare it as PACKLIGHT_LEVEL."""

    name: str
    level: int
    cpu_flags: tuple[str, ...]

    @property
    def compiler_flags(self) -> tuple[str, ...]:
        """As g++ and clang spell them: AMX with a dash, the AVX-512 parts without the underscore."""
        return tuple(
            "-m" + (flag.replace("_", "-") if flag.startswith("amx") else flag.replace("_", ""))
            for flag in self.cpu_flags
        )


VARIANTS = (
    Variant("amx", 4, _AMX),
    Variant("avx512bf16", 3, _AVX512_BF16),
    Variant("avx512", 2, _AVX512),
    Variant("avx2", 1, _AVX2),
    Variant("portable", 0, ()),
)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the CPU offers, in the system's words. Empty where it cannot be asked, which leaves the portable form."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def supported(flags: frozenset[str]) -> tuple[Variant, ...]:
    """The variants a CPU with `flags` runs, best first. The portable one is always among them."""
    return tuple(variant for variant in VARIANTS if flags.issuperset(variant.cpu_flags))
