"""What a bare GPU machine without a network lacks, fetched beforehand: `python -m tests.gpu.wheels`.

The machine has Python 3.12, torch, transformers with what it needs, nvcc and a driver. Wheels go into `.gpu/wheels`,
from where `tests.gpu.check` unpacks them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".gpu/wheels")
MAX_BYTES = 60 << 20
PYTHON = "3.12"
# pip takes a wheel for exactly one of these; the machine's C library is 2.39.
PLATFORMS = (*(f"manylinux_2_{version}_x86_64" for version in range(17, 40)), "manylinux2014_x86_64", "linux_x86_64")
# FlashInfer's newest small release: 0.7 alone is 62 MB. Without dependencies, which would bring CUDA libraries.
WHEELS = (
    "flashinfer-python==0.6.13", "apache-tvm-ffi", "nvidia-ml-py", "ninja", "einops", "tabulate", "click", "requests",
    "urllib3", "idna", "certifi", "charset-normalizer", "tqdm", "packaging", "filelock",
    "fastapi", "starlette", "uvicorn", "h11", "httpx", "httpcore", "anyio", "sniffio", "annotated-doc", "pydantic",
    "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "grpcio", "protobuf",
    "prometheus-client", "redis", "hiredis", "xxhash", "llguidance", "jinja2", "markupsafe", "pyyaml",
    "opentelemetry-api", "gguf", "hypothesis", "sortedcontainers", "attrs", "pytest", "pytest-asyncio",
    "pytest-timeout", "pluggy", "iniconfig", "pygments",
)  # fmt: skip


def main() -> int:
    fresh = FOLDER.with_name("wheels-unfinished")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(fresh)]
    subprocess.run([*fetch, *_pinned()], check=True)
    shutil.rmtree(FOLDER, ignore_errors=True)  # of two versions of a package pip would install none
    fresh.rename(FOLDER)
    num_bytes = sum(path.stat().st_size for path in FOLDER.glob("*.whl"))
    print(f"{len(list(FOLDER.glob('*.whl')))} wheels, {num_bytes / 1e6:.1f} MB, in {FOLDER}")
    return 0 if num_bytes <= MAX_BYTES else 1


def _pinned() -> list[str]:
    """Pydantic and its core belong together, so what is installed here says the versions of both."""
    from importlib.metadata import PackageNotFoundError, version

    def pinned(name: str) -> str:
        try:
            return name if "==" in name else f"{name}=={version(name)}"
        except PackageNotFoundError:
            return name

    return [pinned(name) for name in WHEELS]


if __name__ == "__main__":
    sys.exit(main())
