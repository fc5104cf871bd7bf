"""The Triton kernel behind `ops.py` that stores new tokens. Imported only where Triton is.

Bound by its launch: each head's k and v are read once, rounded to what its page holds, and k is taken into the page's
summary as it was given. The same to the bit as `TorchPageOps`. Legend as in `ops.py`, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight.attention.flashinfer.ops import TokenPlaces
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool


# Triton reads annotations, and knows no types but its own.
@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    k_BKD,
    v_BKD,
    slots_X,
    num_dense_B,
    k_slots,
    v_slots,
    bounds_NE,
    layer,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    num_kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    limit: tl.constexpr,
    has_bounds: tl.constexpr,
) -> None:
    """One (row, KV head) per program. `limit`: the largest number that a slot takes, None if as large as k's."""
    place = tl.program_id(0)
    row, head = (place // num_kv_heads).to(tl.int64), (place % num_kv_heads).to(tl.int64)
    slot = tl.load(slots_X + place)
    at_D = tl.arange(0, padded_dim)
    is_dim_D = at_D < head_dim
    k_D = tl.load(k_BKD + row * k_row_stride + head * k_head_stride + at_D, mask=is_dim_D, other=0.0)
    v_D = tl.load(v_BKD + row * v_row_stride + head * v_head_stride + at_D, mask=is_dim_D, other=0.0)
    k_D, v_D = k_D.to(tl.float32), v_D.to(tl.float32)
    stored_k_D, stored_v_D = k_D, v_D
    if limit is not None:
        stored_k_D, stored_v_D = tl.clamp(k_D, -limit, limit), tl.clamp(v_D, -limit, limit)
    tl.store(k_slots + slot * head_dim + at_D, stored_k_D.to(k_slots.dtype.element_ty), mask=is_dim_D)
    tl.store(v_slots + slot * head_dim + at_D, stored_v_D.to(v_slots.dtype.element_ty), mask=is_dim_D)
    if has_bounds:  # noqa: SIM102 - decided when this is compiled, the other when it runs
        if layer >= tl.load(num_dense_B + row):
            low_at_D = bounds_NE + (slot // page_size) * (2 * head_dim) + at_D
            is_first = slot % page_size == 0
            low_D = tl.load(low_at_D, mask=is_dim_D, other=0.0).to(tl.float32)
            high_D = tl.load(low_at_D + head_dim, mask=is_dim_D, other=0.0).to(tl.float32)
            low_D = tl.where(is_first, k_D, tl.minimum(low_D, k_D))
            high_D = tl.where(is_first, k_D, tl.maximum(high_D, k_D))
            tl.store(low_at_D, low_D.to(bounds_NE.dtype.element_ty), mask=is_dim_D)
            tl.store(low_at_D + head_dim, high_D.to(bounds_NE.dtype.element_ty), mask=is_dim_D)


def store_tokens(
    pool: KVPool | FP8Pool, bounds_NE: Tensor | None, layer: int, k_BKD: Tensor, v_BKD: Tensor, places: TokenPlaces
) -> None:
    """See `PageOps.store`."""
    num_rows, num_kv_heads, head_dim = k_BKD.shape
    k_BKD, v_BKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_BKD, v_BKD))
    is_narrow = pool.k_pages.dtype.itemsize < pool.dtype.itemsize
    _store[(num_rows * num_kv_heads,)](
        k_BKD,
        v_BKD,
        places.slots_LX[layer],
        places.num_dense_B,
        pool.k_pages,
        pool.v_pages,
        bounds_NE if bounds_NE is not None else pool.k_pages,
        layer,
        *k_BKD.stride()[:2],
        *v_BKD.stride()[:2],
        num_kv_heads,
        pool.page_size,
        head_dim,
        triton.next_power_of_2(head_dim),
        torch.finfo(pool.k_pages.dtype).max if is_narrow else None,
        bounds_NE is not None,
        num_warps=1,
    )
