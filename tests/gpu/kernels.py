"""Compile the kernels that the GPU tests and figures use, several at a time: `python -m tests.gpu.kernels`.

FlashInfer compiles a kernel when it is first planned, which takes minutes and would count as the test's or the figure's
own time. Each kernel is planned and run once here, in a process of its own; what was compiled before takes seconds.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import torch

from packlight.attention.flashinfer.kernels import KernelShape, PageCounts
from packlight.attention.flashinfer.wrappers import FlashInferKernels

PAGE, PAGES = 16, 4
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
# Name: prefill or decode, query heads per KV head, head dim, dtype of the pages, window.
KERNELS = {
    "decode-64": (False, 4, 64, BF16, None),
    "decode-64-window": (False, 4, 64, BF16, 20),
    "decode-64-fp8": (False, 4, 64, FP8, None),
    "decode-128": (False, 4, 128, BF16, None),
    "tensor-cores-64": (False, 7, 64, BF16, None),
    "tensor-cores-64-window": (False, 7, 64, BF16, 20),
    "tensor-cores-128": (False, 7, 128, BF16, None),
    "prefill-64": (True, 4, 64, BF16, None),
    "prefill-64-window": (True, 4, 64, BF16, 20),
    "prefill-128": (True, 4, 128, BF16, None),
}


def main(names: list[str]) -> int:
    if names:
        for name in names:
            run(*KERNELS[name])
        return 0
    started = time.monotonic()
    running = {name: subprocess.Popen([sys.executable, "-m", "tests.gpu.kernels", name]) for name in KERNELS}
    failed = []
    for name, process in running.items():
        if process.wait() != 0:
            failed.append(name)
        print(f"{name}: {'failed' if name in failed else 'ready'} after {time.monotonic() - started:.0f} s", flush=True)
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
