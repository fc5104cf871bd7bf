"""FlashInfer's wrappers behind our kernel protocols: the only file that imports FlashInfer.

Knows FlashInfer's API (read in 0.6.13; the calls are the same in 0.7). The import is lazy and takes seconds; kernels
are compiled at the first plan of a shape, or come from FlashInfer's cache. Legend as in `kernels.py`.

Plans copy from pinned memory that belongs to the wrapper, behind the host's back: a wrapper waits for its last plan's
copy before it plans again, which is long done unless two steps were queued.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from packlight.attention.flashinfer.kernels import DecodeKernel, KernelShape, Limits, PageCounts, PrefillKernel
from packlight.attention.flashinfer.workspace import LEAST_BYTES, Workspace, fixed_workspace
from packlight.core.errors import ConfigError
from packlight.kv.table import Int32s

LIMITS = Limits(
    head_dims=(64, 128, 256),
    q_dtypes=(torch.float16, torch.bfloat16),
    kv_dtypes=(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
)
# Query heads per KV head that run on the CUDA cores, where there are kernels for groups of 4 and 8 as well. But what is
# computed with a number that is read grows with the group; from 4 on the tensor cores keep up with the memory.
CUDA_CORE_GROUPS = frozenset({1, 2, 3})
_LAYOUT = "HND"


def is_installed() -> bool:
    """Asked without importing it."""
    return importlib.util.find_spec("flashinfer") is not None


class FlashInferKernels:
    """All kernels of one device share a workspace: they run one after the other."""

    def __init__(
        self,
        device: torch.device,
        library: Any,
        limits: Limits = LIMITS,
        *,
        cuda_core_groups: Collection[int] = CUDA_CORE_GROUPS,
    ) -> None:
        """`library` is the module `flashinfer`, or something that does the same."""
        self.limits = limits
        self._library, self._cuda_core_groups = library, cuda_core_groups
        # Zeroed: semaphores of some kernels live here.
        self._workspace = torch.zeros(LEAST_BYTES, dtype=torch.uint8, device=device)

    @classmethod
    def on(cls, device: torch.device, *, cuda_core_groups: Collection[int] = CUDA_CORE_GROUPS) -> FlashInferKernels:
        """Raises ConfigError where FlashInfer or a CUDA device is missing."""
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(f"attention 'flashinfer' needs a CUDA device, got {device}: choose 'auto' or 'sdpa'")
        try:
            return cls(device, importlib.import_module("flashinfer"), cuda_core_groups=cuda_core_groups)
        except (ImportError, OSError, RuntimeError) as error:  # or a library of it, or parts of different versions
            raise ConfigError(
                f"attention 'flashinfer' cannot be imported ({error}): pip install flashinfer-python, or choose 'sdpa'"
            ) from None

    def decode(self) -> DecodeKernel:
        return _Decode(self, self._library, self._workspace)

    def fixed_decode(self, num_requests: int, max_entries: int) -> DecodeKernel:
        return _FixedDecode(self, self._library, self._workspace.device, num_requests, max_entries)

    def prefill(self) -> PrefillKernel:
        return _Prefill(self._library, self._workspace)

    def on_tensor_cores(self, group: int) -> bool:
        return group not in self._cuda_core_groups

    def workspaces(self, needed: Workspace) -> tuple[Tensor, Tensor]:
        """The one that all share, and a schedule. It grows where it must; who has a smaller one keeps that."""
        device = self._workspace.device
        if needed.partial_bytes > self._workspace.numel():
            self._workspace = torch.zeros(needed.partial_bytes, dtype=torch.uint8, device=device)
        return self._workspace, torch.empty(needed.schedule_bytes, dtype=torch.uint8, device=device)


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
    def __init__(self, kernels: FlashInferKernels, library: Any, workspace: Tensor) -> None:
        self._kernels, self._library, self._workspace = kernels, library, workspace
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
        on_tensor_cores = self._kernels.on_tensor_cores(group)
        if on_tensor_cores not in self._wrappers:
            make = self._library.BatchDecodeWithPagedKVCacheWrapper
            self._wrappers[on_tensor_cores] = make(self._workspace, _LAYOUT, use_tensor_cores=on_tensor_cores)
        return self._wrappers[on_tensor_cores]


class _FixedDecode:
    def __init__(
        self, kernels: FlashInferKernels, library: Any, device: torch.device, num_requests: int, max_entries: int
    ) -> None:
        self._kernels, self._library, self._device = kernels, library, device
        self._indptr, self._indices, self._last_fill = (
            torch.zeros(size, dtype=torch.int32, device=device)
            for size in (num_requests + 1, max_entries, num_requests)
        )
        self._wrapper: Any = None
        self._group = 0
        self._last_plan = _LastPlan(device)

    def plan(self, counts: PageCounts, shape: KernelShape) -> Tensor:
        self._last_plan.wait()
        if self._wrapper is None:
            self._wrapper, self._group = self._make(shape), shape.group
            _plan_decode(self._wrapper, counts, self._indices[: counts.num_entries], shape)
        else:
            assert shape.group == self._group, "a fixed kernel is for one group size"
            self._plan_again(counts, shape)
        self._last_plan.record()
        return self._indices

    def run(self, q_NGD: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> Tensor:
        return _run_decode(self._wrapper, q_NGD, k_XPD, v_XPD)

    def _plan_again(self, counts: PageCounts, shape: KernelShape) -> None:
        """The schedule alone. A full plan goes through the lengths in Python: 0.3 ms of 128 requests, in every step."""
        indptr, last_fill = _lists(counts, self._device)
        self._indptr.copy_(indptr, non_blocking=True)
        self._last_fill.copy_(last_fill, non_blocking=True)
        options = _options(shape)
        del options["o_data_type"]  # stays as it was planned
        self._library.fast_decode_plan(
            self._wrapper,
            indptr,
            self._indices[: counts.num_entries],
            last_fill,
            shape.group,
            1,
            shape.head_dim,
            shape.page_size,
            global_override_indptr_cpu=indptr,
            **options,
        )

    def _make(self, shape: KernelShape) -> Any:
        on_tensor_cores = self._kernels.on_tensor_cores(shape.group)
        needed = fixed_workspace(
            len(self._last_fill),
            shape.group,
            shape.head_dim,
            on_tensor_cores=on_tensor_cores,
            num_multiprocessors=_num_multiprocessors(self._device),
        )
        workspace, schedule = self._kernels.workspaces(needed)
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=on_tensor_cores,
            paged_kv_indptr_buffer=self._indptr,
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=self._last_fill,
        )
        wrapper.reset_workspace_buffer(workspace, schedule)  # its own of 8 MiB would add up over captured steps
        return wrapper


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


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

    def run_with_lse(self, q_THD: Tensor, k_XKPD: Tensor, v_XKPD: Tensor) -> tuple[Tensor, Tensor]:
        out_THD, lse_TH = self._wrapper.run(q_THD, (k_XKPD, v_XKPD), return_lse=True)
        return out_THD, lse_TH * math.log(2)  # FlashInfer's is in base 2


def _lists(counts: PageCounts, device: torch.device) -> tuple[Tensor, Tensor]:
    """`indptr` and `last_page_len` on the host, from where FlashInfer's scheduler reads them; pinned, because copying
    other memory to a GPU may wait for what runs there."""
    indptr, last_fill = torch.from_numpy(counts.indptr), torch.from_numpy(counts.last_fill_N)
    return (indptr.pin_memory(), last_fill.pin_memory()) if device.type == "cuda" else (indptr, last_fill)


def _plan_decode(wrapper: Any, counts: PageCounts, indices: Tensor, shape: KernelShape) -> None:
    indptr, last_fill = _lists(counts, indices.device)
    wrapper.plan(
        indptr,
        indices,
        last_fill,
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
