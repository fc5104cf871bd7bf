"""A stand-in for the module `flashinfer` on a CPU: the same wrappers, computing in plain torch.

It attends to exactly what the page lists say, so a wrong list is a wrong answer; it reads the lists when it runs, as
the kernels do; and it refuses what FlashInfer refuses. Real kernels take fp16 and bf16 and a few head dims; `toy` ones
take float32 and small heads besides, for tests that compare to the last digits.
"""

import math
import types
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import _disable_current_modes

from packlight.attention.flashinfer.kernels import Limits
from packlight.attention.flashinfer.wrappers import LIMITS, FlashInferKernels

# Query heads per KV head that its kernels on the CUDA cores are compiled for (`DISPATCH_GQA_GROUP_SIZE` of 0.6.13).
GROUPS = (1, 2, 3, 4, 8)
WORKSPACE_BYTES = 128 << 20

TOY_LIMITS = Limits(
    head_dims=(2, 8, 16, 32, *LIMITS.head_dims),
    q_dtypes=(torch.float32, *LIMITS.q_dtypes),
    kv_dtypes=(torch.float32, *LIMITS.kv_dtypes),
)


def fake_kernels(*, toy=True, **options):
    """Our adapter over the fake module."""
    limits = TOY_LIMITS if toy else LIMITS
    return FlashInferKernels(torch.device("cpu"), fake_flashinfer(limits), limits, **options)


def fake_flashinfer(limits=LIMITS):
    module = types.SimpleNamespace(plans=0, runs=0, fast_decode_plan=unseen(_Decode.plan_again))
    module.BatchDecodeWithPagedKVCacheWrapper = unseen(partial(_Decode, module, limits))
    module.BatchPrefillWithPagedKVCacheWrapper = unseen(partial(_Prefill, module, limits))
    return module


def unseen(host_work):
    """What it does is not seen by what records torch's operations."""

    def run(*args, **kwargs):
        with _disable_current_modes():
            return host_work(*args, **kwargs)

    return run


class _Wrapper:
    def __init__(self, module, limits, workspace, kv_layout):
        if kv_layout != "HND":
            raise KeyError(f"Invalid kv_layout {kv_layout}")
        if workspace.dtype != torch.uint8 or workspace.numel() < WORKSPACE_BYTES or workspace[:4096].any():
            raise ValueError("the float workspace is 128 MiB of zeros")
        self.module, self.limits, self.planned = module, limits, False

    def remember(self, *, window_left=-1, sm_scale, q_data_type, kv_data_type, o_data_type, **shape):
        if shape["head_dim"] not in self.limits.head_dims:
            raise ValueError(f"Unsupported head_dim: {shape['head_dim']}")
        if q_data_type not in self.limits.q_dtypes or kv_data_type not in self.limits.kv_dtypes:
            raise ValueError(f"no kernel for {q_data_type} and {kv_data_type}")
        self.window_left, self.sm_scale, self.shape = window_left, sm_scale, shape
        self.q_dtype, self.kv_dtype, self.o_dtype, self.planned = q_data_type, kv_data_type, o_data_type, True
        self.module.plans += 1

    def check(self, q, k, v):
        assert self.planned, "run before plan"
        if q.dtype != self.q_dtype or k.dtype != self.kv_dtype:
            raise ValueError("The dtype of q or k does not match the one specified in plan function.")
        assert k.shape == v.shape
        assert k.stride() == v.stride()
        assert k.stride(-1) == q.stride(-1) == 1
        assert k.shape[1:] == tuple(self.shape[name] for name in ("num_kv_heads", "page_size", "head_dim"))
        assert q.shape[1:] == (self.shape["num_qo_heads"], self.shape["head_dim"])
        self.module.runs += 1

    def attend(self, q_QHD, k_SKD, v_SKD, *, causal):
        """Output and log-sum-exp of the last Q of S tokens; window and causality are counted from the end."""
        num_queries, num_tokens, group = len(q_QHD), len(k_SKD), q_QHD.shape[1] // k_SKD.shape[1]
        k_SHD, v_SHD = (x.float().repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
        scores_HQS = torch.einsum("qhd,shd->hqs", q_QHD.float(), k_SHD) * self.sm_scale
        age_QS = torch.arange(num_queries)[:, None] + num_tokens - num_queries - torch.arange(num_tokens)
        hidden_QS = age_QS > self.window_left if self.window_left >= 0 else torch.zeros_like(age_QS, dtype=torch.bool)
        if causal:
            hidden_QS = hidden_QS | (age_QS < 0)
        scores_HQS = scores_HQS.masked_fill(hidden_QS, -torch.inf)
        lse_QH = scores_HQS.logsumexp(-1).T / math.log(2)  # in base 2, as FlashInfer's
        return torch.einsum("hqs,shd->qhd", scores_HQS.softmax(-1), v_SHD).to(self.o_dtype), lse_QH

    def stored(self, k, v, request):
        """K and V `[S, K, D]` of what a request lists, read now."""
        begin, end = self.indptr[request], self.indptr[request + 1]
        pages = self.indices[begin:end].long()
        page_size, fill = self.shape["page_size"], int(self.last_fill[request])
        num_tokens = (int(end - begin) - 1) * page_size + fill
        assert ((pages >= 0) & (pages < len(k))).all(), f"request {request} lists pages outside the cache"
        return (x[pages].transpose(1, 2).flatten(0, 1)[:num_tokens] for x in (k, v))


def _check_lists(indptr, indices, last_fill, page_size):
    for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_fill)):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {x.dtype}")
    assert indptr[0] == 0
    assert len(indptr) == len(last_fill) + 1
    assert len(indices) == indptr[-1]
    assert (indptr.diff() >= 1).all(), "a request lists no page"
    assert ((last_fill >= 1) & (last_fill <= page_size)).all(), f"last_page_len outside 1..{page_size}"


class _Decode(_Wrapper):
    def __init__(
        self,
        module,
        limits,
        workspace,
        kv_layout,
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):
        super().__init__(module, limits, workspace, kv_layout)
        self.use_cuda_graph, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        if use_cuda_graph:
            self.indptr, self.indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
            self.last_fill = paged_kv_last_page_len_buffer

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
        self.workspace_bytes = float_workspace_buffer.numel(), int_workspace_buffer.numel()

    @unseen
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **options):
        _check_lists(indptr, indices, last_page_len, page_size)
        self.check_plan(indices, last_page_len, num_qo_heads, num_kv_heads, head_dim)
        if self.use_cuda_graph:
            self.indptr.copy_(indptr)
            self.indices[: len(indices)].copy_(indices)
            self.last_fill.copy_(last_page_len)
        else:
            self.indptr, self.indices, self.last_fill = indptr.clone(), indices, last_page_len.clone()
        shape = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.remember(page_size=page_size, **shape, **options)

    def check_plan(self, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim):
        group = num_qo_heads // num_kv_heads
        if not self.use_tensor_cores and group not in GROUPS:
            raise ValueError(f"Unsupported group_size: {group}")
        if not self.use_cuda_graph:
            return
        if len(last_page_len) != len(self.last_fill):
            raise ValueError("The batch size should be fixed in cudagraph mode")
        if len(indices) > len(self.indices):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        needed = scheduled_bytes(len(last_page_len), group, head_dim, self.use_tensor_cores, num_multiprocessors=0)
        if any(there < size for there, size in zip(self.workspace_bytes, needed, strict=True)):
            raise RuntimeError(f"Buffer overflow when allocating memory: {needed} > {self.workspace_bytes}")

    def plan_again(self, indptr, indices, last_page_len, *shape, global_override_indptr_cpu, **options):
        """`fast_decode_plan`: of a captured step's lists it schedules, but copies none."""
        assert self.planned, "before a first plan there is no kernel"
        assert self.use_cuda_graph, "only for captured steps here"
        _check_lists(indptr, indices, last_page_len, shape[3])
        assert torch.equal(global_override_indptr_cpu, indptr)
        assert torch.equal(self.indptr, indptr)
        assert torch.equal(self.last_fill, last_page_len)
        self.check_plan(indices, last_page_len, *shape[:3])
        names = ("num_qo_heads", "num_kv_heads", "head_dim", "page_size")
        self.remember(o_data_type=self.o_dtype, **dict(zip(names, shape, strict=True)), **options)

    def run(self, q, paged_kv_cache):
        k, v = paged_kv_cache
        self.check(q, k, v)
        assert len(q) == len(self.last_fill)
        WRAPPERS[id(self)] = self
        return torch.ops.fake_flashinfer.decode(q, k, v, id(self))

    def compute(self, q, k, v):
        out = [self.attend(q[i : i + 1], *self.stored(k, v, i), causal=False)[0] for i in range(len(q))]
        return torch.cat(out)


def scheduled_bytes(num_requests, group, head_dim, use_tensor_cores, *, num_multiprocessors):
    """What the scheduler takes of the float and the int workspace for a captured step, piece by piece, as
    `scheduler.cuh` of 0.6.13 does: each piece begins at a multiple of 16 bytes."""

    def laid_out(*pieces):
        end = 0
        for size in pieces:
            end = -(-end // 16) * 16 + size
        return end

    if use_tensor_cores:
        tile = 128 if group > 64 and head_dim < 256 else 64 if group > 16 else 16
        num_slots = max(2 * num_multiprocessors, -(-num_requests * group // tile) + num_requests - 1)
        lists = (4 * num_slots,) * 3 + (4 * (num_requests + 1), 4, 4, 4 * (num_requests + 1), num_slots)
        rows = group * num_slots * tile
    else:
        num_slots = max(16 * num_multiprocessors, num_requests)
        lists = (4 * num_slots,) * 2 + (4 * (num_slots + 1), 4, num_slots)
        rows = group * num_slots
    return laid_out(rows * head_dim * 4, rows * 4), laid_out(*lists)


# One operation, as a kernel is one launch: what records torch's operations sees this one, and not what is inside.
WRAPPERS: WeakValueDictionary[int, _Decode] = WeakValueDictionary()


@torch.library.custom_op("fake_flashinfer::decode", mutates_args=())
def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wrapper: int) -> torch.Tensor:
    return WRAPPERS[wrapper].compute(q, k, v)


class _Prefill(_Wrapper):
    @unseen
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal,
        **options,
    ):
        _check_lists(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert qo_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr)
        self.qo_indptr, self.causal = qo_indptr.clone(), causal
        self.indptr, self.indices = paged_kv_indptr.clone(), paged_kv_indices
        self.last_fill = paged_kv_last_page_len.clone()
        shape = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim_qk}
        self.remember(page_size=page_size, **shape, **options)

    @unseen
    def run(self, q, paged_kv_cache, *, return_lse=False):
        k, v = paged_kv_cache
        self.check(q, k, v)
        assert len(q) == self.qo_indptr[-1]
        spans = zip(self.qo_indptr[:-1].tolist(), self.qo_indptr[1:].tolist(), strict=True)
        found = [self.attend(q[a:b], *self.stored(k, v, i), causal=self.causal) for i, (a, b) in enumerate(spans)]
        out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (out, lse) if return_lse else out
