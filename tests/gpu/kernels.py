"""Compile the kernels that the GPU tests and figures use, several at a time: `python -m tests.gpu.kernels`.

FlashInfer compiles a kernel when it is first planned, which takes minutes and would count as the test's or the figure's
own time. Each kernel is planned and run once here, in a process of its own; what was compiled before takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import torch

from packlight.attention.flashinfer.kernels import KernelShape, PageCounts
from packlight.attention.flashinfer.wrappers import FlashInferKernels

PAGE, PAGES = 16, 4
POLL_S = 0.5
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
# Compilers that one kernel may run at once. The prefill kernels decide how long it takes: each is in ten parts, some of
# which take minutes and 3 GB, so all of them should begin at once; and there is memory for that many, but not for all.
JOBS_EACH = 10
# Tests go on meanwhile, and few wait for this one.
USUAL_NICE, NICE = 5, {"prefill-128-window": 19}
# Name: prefill or decode, query heads per KV head, head dim, dtype of the pages, window.
KERNELS = {
    "prefill-128": (True, 4, 128, BF16, None),
    "prefill-128-window": (True, 4, 128, BF16, 20),
    "tensor-cores-128": (False, 4, 128, BF16, None),
    "tensor-cores-128-window": (False, 4, 128, BF16, 20),
    "tensor-cores-128-fp8": (False, 4, 128, FP8, None),
    "cuda-cores-128": (False, 2, 128, BF16, None),
    "cuda-cores-128-window": (False, 2, 128, BF16, 20),
    "cuda-cores-128-fp8": (False, 2, 128, FP8, None),
    "cuda-cores-64": (False, 2, 64, BF16, None),
}


def main(names: list[str]) -> int:
    if names:
        for name in names:
            os.nice(NICE.get(name, USUAL_NICE))
            run(*KERNELS[name])
        return 0
    started = time.monotonic()
    environ = {"MAX_JOBS": str(JOBS_EACH), **os.environ}
    running = {
        name: subprocess.Popen([sys.executable, "-m", "tests.gpu.kernels", name], env=environ) for name in KERNELS
    }
    failed = []
    while running:
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            what = "ready" if process.returncode == 0 else "failed"
            failed += [name] if process.returncode else []
            print(f"{name}: {what} after {time.monotonic() - started:.0f} s", flush=True)
        time.sleep(POLL_S)
    return 1 if failed else 0


def run(is_prefill: bool, group: int, head_dim: int, kv_dtype: torch.dtype, window: int | None) -> None:
    """One request with one KV head."""
    kernels, device = FlashInferKernels.on(torch.device("cuda")), "cuda"
    shape = KernelShape(group, head_dim, PAGE, BF16, kv_dtype, head_dim**-0.5, window)
    counts = PageCounts(np.array([PAGES], dtype=np.int32), np.array([PAGE], dtype=np.int32))
    pages = torch.arange(PAGES, dtype=torch.int32, device=device)
    k, v = (torch.zeros(PAGES, PAGE, head_dim, device=device).to(kv_dtype) for _ in range(2))
    if is_prefill:
        prefill, num_tokens = kernels.prefill(), 3
        prefill.plan(np.array([num_tokens], dtype=np.int32), counts, pages, shape, group)
        out = prefill.run(torch.zeros(num_tokens, group, head_dim, dtype=BF16, device=device), k[:, None], v[:, None])
    else:
        decode = kernels.decode()
        decode.plan(counts, shape).copy_(pages)
        out = decode.run(torch.zeros(1, group, head_dim, dtype=BF16, device=device), k, v)
    assert out.isfinite().all()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
