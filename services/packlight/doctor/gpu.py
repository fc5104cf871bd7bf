"""GPUs and what computing and shipping on them takes. Without `model.device: cuda` none of it is needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess

from packlight.doctor.base import Finding, Patient, human_bytes, missing, ok, unused, warning

_QUERY_TIMEOUT_S = 10.0


def check_gpu(patient: Patient) -> Finding:
    """The driver sees a GPU, torch can use it, and the KV pools fit beside what lies on it."""
    driver = _driver()
    if not patient.uses_gpu:
        return unused(f"{driver or 'none'}; model.device is {patient.config.model.device}")
    if driver is None:
        return missing("nvidia-smi finds no GPU", "install the driver; in Kubernetes, ask for nvidia.com/gpu")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return missing(
            f"{driver}, but torch {torch.__version__} cannot use it", "install torch for this driver's CUDA version"
        )
    free, total = torch.cuda.mem_get_info(patient.config.model.device)
    found = f"{driver}; {human_bytes(free)} of {human_bytes(total)} free"
    pools = patient.pool_bytes / max(section.tensor_parallel for section in patient.sections.values())
    if pools > free:
        return missing(f"{found}, KV pools take {human_bytes(pools)} of each GPU", "lower kv_memory_bytes")
    return ok(found)


def check_triton(patient: Patient) -> Finding:
    """Our kernels on GPUs, and the C compiler that what launches them is made with, when each first runs."""
    if not patient.uses_gpu:
        return unused("only needed on GPUs")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return warning("not installed", "install torch for CUDA, which brings it; until then steps are torch's, slower")
    compiler = patient.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return missing(f"{version}, but no C compiler", "apt-get install --no-install-recommends gcc libc6-dev")
    return ok(f"{version}, with {compiler}")


def check_nvcc(patient: Patient) -> Finding:
    """FlashInfer compiles what its wheels do not bring."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return ok(nvcc)
    if not patient.uses_gpu:
        return unused("not installed")
    return warning("not on PATH", "install the CUDA toolkit, or flashinfer-jit-cache with its kernels compiled")


def check_flashinfer(patient: Patient) -> Finding:
    """Attention on GPUs."""
    for name in ("flashinfer-python", "flashinfer"):
        try:
            return ok(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    if not patient.uses_gpu:
        return unused("not installed")
    return warning("not installed", "pip install flashinfer-python; until then attention on the GPU is torch's")


def check_nccl(patient: Patient) -> Finding:
    """Shipping KV from GPU to GPU; comes with torch for CUDA."""
    if not patient.uses_gpu:
        return unused("only needed between GPUs")
    torch = importlib.import_module("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return warning(f"torch {torch.__version__} has none", "install torch for CUDA; until then KV goes through gRPC")
    return ok(".".join(str(part) for part in torch.cuda.nccl.version()))


def _driver() -> str | None:
    """Names of the GPUs and the driver's version, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.rpartition(", ") for line in done.stdout.strip().splitlines()]
    return f"{', '.join(name for name, _, _ in rows)} (driver {rows[0][2]})" if rows else None
