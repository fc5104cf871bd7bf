"""`packlight doctor`: the table of checks, and how its findings are printed.

Exit code 0 when the role can start and serve, 1 when something that it needs is missing. Warnings do not count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from types import MappingProxyType

from packlight import __version__
from packlight.core.config import Config
from packlight.doctor.base import Check, Finding, Level, Patient, examine
from packlight.doctor.certificates import check_tls
from packlight.doctor.collector import check_traces
from packlight.doctor.gpu import check_flashinfer, check_gpu, check_nccl, check_nvcc, check_triton
from packlight.doctor.machine import check_cores, check_cpu, check_memory, check_python, check_shared_memory
from packlight.doctor.software import check_model, check_native, check_torch, check_transformers
from packlight.doctor.surroundings import check_ports, check_redis
from packlight.doctor.transports import check_nixl, check_process_groups

SUMMARY = "say what is there, what is missing, and how to get it"
ROLES = ("serve", "router", "prefill", "decode")

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "python": check_python,
        "torch": check_torch,
        "transformers": check_transformers,
        "cpu": check_cpu,
        "native kernels": check_native,
        "cores": check_cores,
        "memory": check_memory,
        "shared memory": check_shared_memory,
        "model": check_model,
        "ports": check_ports,
        "redis": check_redis,
        "tls": check_tls,
        "traces": check_traces,
        "gpu": check_gpu,
        "triton": check_triton,
        "nvcc": check_nvcc,
        "flashinfer": check_flashinfer,
        "nccl": check_nccl,
        "process groups": check_process_groups,
        "nixl": check_nixl,
    }
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`, beside those that every command has."""
    parser.add_argument("--for", dest="patient", choices=ROLES, default="serve", help="the role to examine (serve)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace, config: Config, environ: Mapping[str, str]) -> int:
    """Examines, prints, and returns the exit code."""
    patient = Patient(arguments.patient, config, environ)
    findings = {name: examine(check, patient) for name, check in CHECKS.items()}
    print(as_json(patient.role, findings) if arguments.json else as_table(patient.role, findings))
    return 0 if is_well(findings) else 1


def is_well(findings: Mapping[str, Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(finding.level is not Level.MISSING for finding in findings.values())


def as_table(role: str, findings: Mapping[str, Finding]) -> str:
    """A line for each check, another for its fix, and the verdict."""
    lines = []
    for name, finding in findings.items():
        lines.append(f"{finding.level:<8} {name:<15} {finding.found}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<15} -> {finding.fix}")
    gaps = [name for name, finding in findings.items() if finding.level is Level.MISSING]
    verdict = f"not yet: {', '.join(gaps)}" if gaps else "yes"
    return "\n".join([*lines, "", f"Can `packlight {role}` run here? {verdict}"])


def as_json(role: str, findings: Mapping[str, Finding]) -> str:
    """`{"version", "role", "ok", "checks": [{"name", "level", "found", "fix"}]}`."""
    checks = [
        {"name": name, "level": finding.level.value, "found": finding.found, "fix": finding.fix}
        for name, finding in findings.items()
    ]
    return json.dumps({"version": __version__, "role": role, "ok": is_well(findings), "checks": checks}, indent=2)
