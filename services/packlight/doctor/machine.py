"""The machine: CPU, cores, memory and shared memory, with the limits of a container in mind.

Knows Linux' /proc and cgroup files. Where they are missing (macOS) it says what it could not see.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from packlight.doctor.base import Finding, Patient, human_bytes, missing, ok, unused, warning

MIN_PYTHON = (3, 11)
MIN_SHARED_BYTES = 64 << 20  # Docker's default, of which one long prompt's KV is more
_ISA: Mapping[str, set[str]] = {
    "AVX2": {"avx2", "fma"},
    "AVX-512": {"avx512f", "avx512bw"},
    "AVX-512 BF16": {"avx512_bf16"},
    "AMX": {"amx_tile", "amx_bf16"},
}


def check_python(_: Patient) -> Finding:
    """The interpreter's version."""
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if sys.version_info < MIN_PYTHON:
        return missing(found, f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed")
    return ok(found)


def check_cpu(patient: Patient) -> Finding:
    """Name and vector instructions. Without AVX2 an x86 CPU computes many times slower."""
    info = _cpu_info(patient.root / "proc" / "cpuinfo")
    if "flags" not in info:
        return ok(info.get("model name", "instructions unknown: there is no /proc/cpuinfo of the x86 kind"))
    flags = set(info["flags"].split())
    sets = [name for name, needed in _ISA.items() if needed <= flags]
    found = f"{info.get('model name', 'x86')}: {', '.join(sets) or 'no vector instructions of note'}"
    if "AVX2" not in sets and patient.computes and not patient.uses_gpu:
        return warning(found, "use a CPU with AVX2 or newer; in a virtual machine, pass the host's CPU model through")
    return ok(found)


def check_cores(patient: Patient) -> Finding:
    """Cores this process may use against the threads it is told to compute with."""
    num_cores = usable_cores(patient.root)
    threads = {name: section.threads for name, section in patient.sections.items() if section.threads}
    wanted = max(threads.values(), default=0)
    found = f"{num_cores:g} cores" + "".join(f", {name}.threads {number}" for name, number in threads.items())
    if wanted > num_cores:
        return warning(
            found, "set threads to the number of cores at most: threads that share a core slow every step down"
        )
    return ok(found)


def check_memory(patient: Patient) -> Finding:
    """Memory that can be had against the KV pools. Weights come on top: their size is the model's files', or twice that
    for a quantised GGUF."""
    pools = patient.pool_bytes
    available = available_bytes(patient.root)
    if available is None:
        return ok(f"unknown here; KV pools take {human_bytes(pools)}")
    found = f"{human_bytes(available)} available, KV pools take {human_bytes(pools)}"
    if patient.uses_gpu or not patient.sections:
        return ok(f"{human_bytes(available)} available")
    if pools > available:
        names = " or ".join(f"{name}.kv_memory_bytes" for name in patient.sections)
        return missing(found, f"lower {names}, or give the process more memory")
    if pools > 0.8 * available:
        return warning(found, "leave a fifth for weights and scratch: lower kv_memory_bytes")
    return ok(found)


def check_shared_memory(patient: Patient) -> Finding:
    """/dev/shm, through which processes of one machine hand KV over."""
    if not patient.computes:
        return unused("the router ships no KV")
    folder = patient.root / "dev" / "shm"
    if not folder.is_dir():
        return warning("there is no /dev/shm", "KV goes through sockets instead; on Linux, mount a tmpfs there")
    stats = os.statvfs(folder)
    total, free = stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail
    found = f"{human_bytes(free)} of {human_bytes(total)} free in /dev/shm"
    if free <= MIN_SHARED_BYTES:
        return warning(found, "give containers more: docker run --shm-size 1g, or the chart's workers.sharedMemory")
    return ok(found)


def usable_cores(root: Path) -> float:
    """Cores by affinity, or fewer by the container's CPU quota (cgroup v2, then v1)."""
    num_cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = root / "sys" / "fs" / "cgroup"
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return num_cores if quota == "max" else min(num_cores, int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota_us, period_us = (int((group / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return num_cores if quota_us < 0 else min(num_cores, quota_us / period_us)
    return num_cores


def available_bytes(root: Path) -> int | None:
    """Memory that can be had without swapping: the machine's, or less by the container's limit. None: unknown."""
    known = []
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        known.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    group = root / "sys" / "fs" / "cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            known.append(max(0, int((group / limit).read_text()) - int((group / used).read_text())))
    return min(known, default=None)


def _cpu_info(file: Path) -> dict[str, str]:
    """The first CPU's entry; empty where there is none."""
    with suppress(OSError):
        first = file.read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}
