"""What the transports beside the stream take. Without their names in `decode.transports` none of it is needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

from packlight.doctor.base import Finding, Patient, ok, unused, warning

_NIXL = ("nixl_cu12", "nixl_cu13")
_INSTALL_NIXL = (
    "pip install --no-deps nixl-cu12 (or nixl-cu13, as torch's CUDA is); until then the next transport is used"
)


def check_process_groups(patient: Patient) -> Finding:
    """The backends that torch.distributed has here: NCCL between GPUs, Gloo for the rest and for the words."""
    if not patient.computes:
        return unused("the router does without")
    distributed = importlib.import_module("torch").distributed
    is_there = distributed.is_available()
    backends = [name for name in ("gloo", "nccl") if is_there and getattr(distributed, f"is_{name}_available")()]
    found = f"torch.distributed with {', '.join(backends)}" if backends else "torch.distributed has no backend"
    if not _wants(patient, "process_group"):
        return unused(f"{found}; process_group is not among decode.transports")
    if "gloo" not in backends:
        return warning(found, "install a torch with Gloo; until then the next transport is used")
    if patient.uses_gpu and "nccl" not in backends:
        return warning(found, "install torch for CUDA; until then KV goes through the CPU's memory")
    return ok(found)


def check_nixl(patient: Patient) -> Finding:
    """The library, on both kinds of workers; not imported, as that starts threads."""
    if not patient.computes:
        return unused("the router does without")
    found = next((name for name in _NIXL if importlib.util.find_spec(name) is not None), None)
    if found is None:
        if _wants(patient, "nixl"):
            return warning("not installed", _INSTALL_NIXL)
        return unused("not installed; nixl is not among decode.transports")
    version = f"{found} {importlib.metadata.version(found.replace('_', '-'))}"
    return ok(version) if _wants(patient, "nixl") else unused(f"{version}; nixl is not among decode.transports")


def _wants(patient: Patient, transport: str) -> bool:
    """A prefill worker sends by whatever it is asked for, so a fleet has one list: that of its decode workers."""
    return transport in patient.config.decode.transports
