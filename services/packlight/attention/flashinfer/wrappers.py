"""FlashInfer's wrappers behind our kernel protocols: the only file that imports FlashInfer.

Knows FlashInfer's API (read in 0.6.13; the calls are the same in 0.7). The import is lazy and takes seconds; kernels
are compiled at the first plan of a shape, or come from FlashInfer's cache. Legend as in `kernels.py`.

Plans copy from pinned memory that belongs to the wrapper, behind the host's back: a wrapper waits for its last plan's
copy before it plans again, which is long done unless two steps were queued.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from packlight.attention.flashinfer.kernels import DecodeKernel, KernelShape, Limits, PageCounts, PrefillKernel
from packlight.core.errors import ConfigError
from packlight.kv.table import Int32s

LIMITS = Limits(
    head_dims=(64, 128, 256),
    q_dtypes=(torch.float16, torch.bfloat16),
    kv_dtypes=(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
)
# Query heads per KV head for which there is a kernel on the CUDA cores. Others run on the tensor cores.
CUDA_CORE_GROUPS = frozenset({1, 2, 3, 4, 6, 8, 16})
WORKSPACE_BYTES = 128 << 20
# A schedule takes some 30 bytes per request and multiprocessor slot; FlashInfer's own 8 MiB add up over captured steps.
SCHEDULE_BYTES = 256 << 10
_LAYOUT = "HND"


def is_installed() -> bool:
    """Asked without importing it."""
    return importlib.util.find_spec("flashinfer") is not None


class FlashInferKernels:
    """All kernels of one device share a workspace: they run one after the other."""

    def __init__(self, device: torch.device, library: Any, limits: Limits = LIMITS) -> None:
        """`library` is the module `flashinfer`, or something that does the same."""
        self.limits = limits
        self._library = library
        # Zeroed: semaphores of some kernels live here.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    @classmethod
    def on(cls, device: torch.device) -> FlashInferKernels:
        """Raises ConfigError where FlashInfer or a CUDA device is missing."""
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(f"attention 'flashinfer' needs a CUDA device, got {device}: choose 'auto' or 'sdpa'")
        try:
            return cls(device, importlib.import_module("flashinfer"))
        except ImportError as error:
            raise ConfigError(
                f"attention 'flashinfer' cannot be imported ({error}): pip install flashinfer-python, or choose 'sdpa'"
            ) from None

    def decode(self) -> DecodeKernel:
        return _Decode(self._library, self._workspace)

    def fixed_decode(self, num_requests: int, max_entries: int) -> DecodeKernel:
        return _FixedDecode(self._library, self._workspace, num_requests, max_entries)

    def prefill(self) -> PrefillKernel:
        return _Prefill(self._library, self._workspace)


class _LastPlan:
    """Whether the copies of the last plan are done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()  # returns at once if nothing was recorded

    def record(self) -> None:
        if self._event is not None:
            self._event.record()


class _Decode:
    def __init__(self, library: Any, workspace: Tensor) -> None:
        self._library, self._workspace = library, workspace
        self._wrappers: dict[bool, Any] = {}  # by whether they run on the tensor cores
        self._wrapper: Any = None  # the one that was planned last
        self._last_plan = _LastPlan(workspace.device)

    def plan(self, counts: PageCounts, shape: KernelShape) -> Tensor:
        # FlashInfer keeps a tensor of its own device as it is, so what is written here later is what runs.
        indices = torch.empty(counts.num_entries, dtype=torch.int32, device=self._workspace.device)
        self._last_plan.wait()
        self._wrapper = self._wrapper_for(shape.group)
        _plan_decode(self._wrapper, counts, indices, shape)
        self._last_plan.record()
        return indices

    def run(self, q_NGD: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> Tensor:
        return _run_decode(self._wrapper, q_NGD, k_XPD, v_XPD)

    def _wrapper_for(self, group: int) -> Any:
        on_tensor_cores = group not in CUDA_CORE_GROUPS
        if on_tensor_cores not in self._wrappers:
            make = self._library.BatchDecodeWithPagedKVCacheWrapper
            self._wrappers[on_tensor_cores] = make(self._workspace, _LAYOUT, use_tensor_cores=on_tensor_cores)
        return self._wrappers[on_tensor_cores]


class _FixedDecode:
    def __init__(self, library: Any, workspace: Tensor, num_requests: int, max_entries: int) -> None:
        self._library, self._workspace = library, workspace
        self._indptr, self._indices, self._last_fill = (
            torch.zeros(size, dtype=torch.int32, device=workspace.device)
            for size in (num_requests + 1, max_entries, num_requests)
        )
        self._wrapper: Any = None
        self._group = 0
        self._last_plan = _LastPlan(workspace.device)

    def plan(self, counts: PageCounts, shape: KernelShape) -> Tensor:
        assert self._wrapper is None or shape.group == self._group, "a fixed kernel is for one group size"
        if self._wrapper is None:
            self._wrapper, self._group = self._make(shape.group), shape.group
        self._last_plan.wait()
        _plan_decode(self._wrapper, counts, self._indices[: counts.num_entries], shape)
        self._last_plan.record()
        return self._indices

    def run(self, q_NGD: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> Tensor:
        return _run_decode(self._wrapper, q_NGD, k_XPD, v_XPD)

    def _make(self, group: int) -> Any:
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=group not in CUDA_CORE_GROUPS,
            paged_kv_indptr_buffer=self._indptr,
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=self._last_fill,
        )
        schedule = torch.empty(SCHEDULE_BYTES, dtype=torch.uint8, device=self._workspace.device)
        wrapper.reset_workspace_buffer(self._workspace, schedule)
        return wrapper


class _Prefill:
    def __init__(self, library: Any, workspace: Tensor) -> None:
        self._wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, _LAYOUT)
        self._last_plan = _LastPlan(workspace.device)

    def plan(
        self, num_tokens_N: Int32s, counts: PageCounts, pages_J: Tensor, shape: KernelShape, num_heads: int
    ) -> None:
        self._last_plan.wait()
        qo_indptr = torch.zeros(len(num_tokens_N) + 1, dtype=torch.int32)
        qo_indptr[1:] = torch.from_numpy(num_tokens_N).cumsum(0)
        self._wrapper.plan(
            qo_indptr,
            torch.from_numpy(counts.indptr),
            pages_J,
            torch.from_numpy(counts.last_fill_N),
            num_heads,
            num_heads // shape.group,
            shape.head_dim,
            shape.page_size,
            causal=True,
            **_options(shape),
        )
        self._last_plan.record()

    def run(self, q_THD: Tensor, k_XKPD: Tensor, v_XKPD: Tensor) -> Tensor:
        out_THD: Tensor = self._wrapper.run(q_THD, (k_XKPD, v_XKPD))
        return out_THD


def _plan_decode(wrapper: Any, counts: PageCounts, indices: Tensor, shape: KernelShape) -> None:
    # Given on the host, the lengths are not fetched from the device, which would wait for it.
    wrapper.plan(
        torch.from_numpy(counts.indptr),
        indices,
        torch.from_numpy(counts.last_fill_N),
        shape.group,
        1,
        shape.head_dim,
        shape.page_size,
        **_options(shape),
    )


def _run_decode(wrapper: Any, q_NGD: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> Tensor:
    out_NGD: Tensor = wrapper.run(q_NGD, (k_XPD.unsqueeze(1), v_XPD.unsqueeze(1)))
    return out_NGD


def _options(shape: KernelShape) -> dict[str, Any]:
    """FlashInfer's window does not count the token itself."""
    return {
        "window_left": -1 if shape.sliding_window is None else shape.sliding_window - 1,
        "sm_scale": shape.scale,
        "q_data_type": shape.q_dtype,
        "kv_data_type": shape.kv_dtype,
        "o_data_type": shape.q_dtype,
    }
