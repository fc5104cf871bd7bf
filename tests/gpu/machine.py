"""The machine that GPU parts run on: where their packages come from, what compiles their kernels, what it is called.

A bare GPU machine has torch in an environment of its own, which another environment cannot see through. So what was
carried (`wheels.py`) is unpacked into a folder that Python looks into first, and nothing is installed.

FlashInfer compiles with the CUDA toolkit. Where that has no cuRAND headers, or no `libcuda` to link with, torch's own
packages and the driver have them; they are searched last.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".gpu"
WHEELS, SITE, LINKS = STATE / "wheels", STATE / "site", STATE / "lib"
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/cuda/compat")
LOOK_S = 120.0
# Where this is set, a test that lacks what it tests has failed.
NOTHING_SKIPPED = "PACKLIGHT_GPU_CHECK"


def unpack_wheels() -> None:
    """Unless they are unpacked already. Raises CalledProcessError if pip cannot."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    unpacked, names = SITE / "unpacked.txt", "\n".join(wheels)
    if not wheels or (unpacked.is_file() and unpacked.read_text() == names):
        return
    shutil.rmtree(SITE, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", str(SITE), *wheels], check=True)
    unpacked.write_text(names)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """For every part."""
    toolkit = cuda_home(environ)
    tools = [toolkit / "bin"] if toolkit is not None else []
    path = [SITE / "bin", Path(sys.executable).parent, environ.get("PATH", os.defpath), *tools]
    python_path = [*([SITE] if SITE.is_dir() else []), ROOT / "services", ROOT]
    found = {**environ, "PYTHONUNBUFFERED": "1", "PATH": _joined(path), "PYTHONPATH": _joined(python_path)}
    found[NOTHING_SKIPPED] = "1"
    found.setdefault("FLASHINFER_WORKSPACE_BASE", str(STATE))  # a second run finds what the first one compiled
    if toolkit is not None:
        found["CUDA_HOME"] = str(toolkit)
        found["FLASHINFER_EXTRA_LDFLAGS"] = f"-L{_links(toolkit, environ)}"
    headers = _torch_cuda() / "include"
    if headers.is_dir():
        found["FLASHINFER_EXTRA_CUDAFLAGS"] = f"-isystem {headers}"
    return found


def cuda_home(environ: Mapping[str, str]) -> Path | None:
    """The toolkit: with a compiler and headers."""
    compiler = shutil.which("nvcc", path=environ.get("PATH"))
    named = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    beside = [place.parents[1] for place in (Path(compiler).resolve(), Path(compiler))] if compiler else []
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in (*named, *beside, *usual):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def has_gpu(environ: Mapping[str, str]) -> bool:
    return (
        _output([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], environ)[0].strip() == "True"
    )


def describe(environ: Mapping[str, str], commit: str | None) -> dict[str, Any]:
    """Device, versions and commit; `problem` says what could not be found out, and without a GPU there is no device."""
    said, problem = _output([sys.executable, "-c", _DESCRIBE], environ)
    found = last_object(said) or {"problem": problem}
    for name, command in (("nvcc", ["nvcc", "--version"]), ("compiler", ["c++", "--version"]), ("ninja", _NINJA)):
        lines = _output(command, environ)[0].strip().splitlines()
        found[name] = lines[-1] if lines else None
    return found | {"commit": commit_of(environ, commit), "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def commit_of(environ: Mapping[str, str], told: str | None) -> str | None:
    """What was `told`, else what git says; None where it says nothing."""
    return told or _output(["git", "rev-parse", "HEAD"], environ)[0].strip() or None


def last_object(said: str) -> dict[str, Any]:
    """The last line that is a JSON object; empty if there is none."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


_NINJA = ["ninja", "--version"]
_DESCRIBE = """
import json, platform
found = {"python": platform.python_version()}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {"device": torch.cuda.get_device_name(0), "memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    import triton, transformers
    found |= {"triton": triton.__version__, "transformers": transformers.__version__}
    import flashinfer
    found |= {"flashinfer": flashinfer.__version__}
except Exception as error:
    found["problem"] = repr(error)
print(json.dumps(found))
"""


def _output(command: list[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """What it printed, and what went wrong; a command that is not there printed nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(environ), timeout=LOOK_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", repr(error)
    return done.stdout, done.stderr[-500:]


def _links(toolkit: Path, environ: Mapping[str, str]) -> Path:
    """A folder in which the linker finds what the toolkit's own may lack: the driver and the runtime by their names."""
    LINKS.mkdir(parents=True, exist_ok=True)
    folders = [*environ.get("LD_LIBRARY_PATH", "").split(":"), *DRIVER_FOLDERS, str(_torch_cuda() / "lib")]
    lacking = {"libcuda": toolkit / "lib64" / "stubs" / "libcuda.so", "libcudart": toolkit / "lib64" / "libcudart.so"}
    for name, usual in lacking.items():
        there = next((file for folder in folders if folder for file in sorted(Path(folder).glob(f"{name}.so*"))), None)
        link = LINKS / f"{name}.so"
        if not usual.exists() and there is not None and not link.exists():
            link.symlink_to(there)
    return LINKS


def _torch_cuda() -> Path:
    """Where the CUDA libraries lie that torch brought along."""
    return Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"


def _joined(parts: list[Any]) -> str:
    return os.pathsep.join(map(str, parts))
