"""The Triton kernels behind `ops.py` that choose pages. Imported only where Triton is; `TorchPageOps` does the same.

Bound by memory or by their launch: each summary is read once, where it lies, and each page id only if it is wanted. All
sums are fp32 on the CUDA cores: tensor cores would round to tf32, which decides among pages whose ratings lie close
together. Sums are added up in another order than torch's, so ratings differ from the twin's by rounding, and pages by
those whose ratings differ by no more. What is picked of given ratings is the same to the bit.

A launch takes nothing that depends on what is in a tensor, and no integer is a reason to compile anew but sizes of the
model and the capacity of a plan. Legend as in `ops.py`, D head dim, F fields of `SparseHeads`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight.attention.flashinfer.heads import Field, LayerTable, SparseHeads
from packlight.attention.flashinfer.ops import PLAIN_POOLS, TokenPlaces, TorchPageOps
from packlight.attention.flashinfer.rating import is_mass
from packlight.attention.flashinfer.store_kernel import store_tokens
from packlight.kv.pool import PackedPool
from packlight.kv.reading import PageRule

# Numbers of summaries that one program holds at once: 32 pages of head dim 128.
_TILE = 8192
# A head's pages are picked by one program. It holds some words for each in its registers.
_PAGES_PER_WARP, _MIN_WARPS, _MAX_WARPS = 256, 4, 16
# Triton reads globals only where they are constants of its own.
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_TABLE, _ASKED, _LENGTH, _NUM_READ, _BEGIN = (tl.constexpr(int(field)) for field in Field)


# Triton reads annotations, and knows no types but its own.
@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """int64 >= 0 that order as the floats do, and are equal where they are."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is another number, by its bits
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def _are_best(keys, count):  # type: ignore[no-untyped-def]
    """Which of the keys (0 to 2^32 - 1) are the `count` largest, ties to the lower index. The smallest of those is the
    largest number that so many keys reach: found bit by bit."""
    least = tl.zeros((), dtype=tl.int64)
    for place in range(32):
        higher = least + (tl.full((), 1, tl.int64) << (31 - place))
        num_reach = tl.sum((keys >= higher).to(tl.int32), axis=0)
        least = tl.where(num_reach >= count, higher, least)
    is_above, is_equal = keys > least, keys == least
    num_wanted = count - tl.sum(is_above.to(tl.int32), axis=0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= num_wanted))


@triton.jit(do_not_specialize=["before", "num_heads", "num_pages"])  # type: ignore[untyped-decorator]
def _rate(  # type: ignore[no-untyped-def]
    q_XGD,
    bounds_NE,
    ids,
    fields_FY,
    ratings_YRM,
    before,
    scale,
    num_heads,
    num_pages,
    page_size: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_pages: tl.constexpr,
    by_mass: tl.constexpr,
    num_dims: tl.constexpr,
) -> None:
    """Some pages of one head per program."""
    head = tl.program_id(0).to(tl.int64)
    field = fields_FY + head
    length = tl.load(field + _LENGTH * num_heads)
    first_page = tl.program_id(1) * tile_pages
    if first_page * page_size >= length:
        return
    page_M = first_page + tl.arange(0, tile_pages)
    is_page_M = page_M * page_size < length
    ids_at_M = ids + tl.load(field + _TABLE * num_heads) + before + page_M
    low_at_M = bounds_NE + tl.load(ids_at_M, mask=is_page_M, other=0).to(tl.int64) * (2 * head_dim)
    at_D = tl.arange(0, padded_dim)
    is_dim_D = at_D < head_dim
    low_at_MD, is_there_MD = low_at_M[:, None] + at_D[None, :], is_page_M[:, None] & is_dim_D[None, :]
    low_MD = tl.load(low_at_MD, mask=is_there_MD, other=0.0).to(tl.float32)
    high_MD = tl.load(low_at_MD + head_dim, mask=is_there_MD, other=0.0).to(tl.float32)
    q_at_D = q_XGD + tl.load(field + _ASKED * num_heads) * group * head_dim + at_D
    sum_D, size_D = tl.zeros((padded_dim,), dtype=tl.float32), tl.zeros((padded_dim,), dtype=tl.float32)
    below_D, above_D = tl.zeros((padded_dim,), dtype=tl.float32), tl.zeros((padded_dim,), dtype=tl.float32)
    for member in tl.static_range(group):
        q_D = tl.load(q_at_D + member * head_dim, mask=is_dim_D, other=0.0).to(tl.float32)
        sum_D += q_D
        size_D += tl.abs(q_D)
        below_D += tl.minimum(q_D, 0.0)
        above_D += tl.maximum(q_D, 0.0)
    if by_mass:
        key_MD = tl.where((sum_D > 0)[None, :], high_MD, low_MD)
        is_kept_D = is_dim_D
        if num_dims < head_dim:
            is_kept_D = _are_best(tl.where(is_dim_D, _ordered(size_D), 0), num_dims)
        for member in tl.static_range(group):
            q_D = tl.load(q_at_D + member * head_dim, mask=is_dim_D, other=0.0).to(tl.float32)
            kept_D = tl.where(is_kept_D, q_D, 0.0)
            share = tl.maximum(tl.sum(tl.abs(kept_D), axis=0), _TINY) / tl.maximum(tl.sum(tl.abs(q_D), axis=0), _TINY)
            probe_D = kept_D * (scale * tl.rsqrt(share))
            logits_M = tl.sum(key_MD * probe_D[None, :], axis=1)
            tl.store(ratings_YRM + (head * group + member) * num_pages + page_M, logits_M, mask=is_page_M)
    else:
        sums_M = tl.sum(low_MD * below_D[None, :] + high_MD * above_D[None, :], axis=1)
        tl.store(ratings_YRM + head * num_pages + page_M, sums_M, mask=is_page_M)


@triton.jit  # type: ignore[untyped-decorator]
def _mass(  # type: ignore[no-untyped-def]
    logit_at_M, is_page_M, num_tokens_M, num_pages, num_rows: tl.constexpr, padded_pages: tl.constexpr
):
    """Shares of attention, the sum over rows of logits that lie `num_pages` apart."""
    mass_M = tl.zeros((padded_pages,), dtype=tl.float32)
    for row in tl.static_range(num_rows):
        logits_M = tl.load(logit_at_M + row * num_pages, mask=is_page_M, other=-float("inf")) + tl.log(num_tokens_M)
        weights_M = tl.exp(logits_M - tl.max(logits_M, axis=0))
        mass_M += weights_M / tl.sum(weights_M, axis=0)
    return mass_M


@triton.jit(do_not_specialize=["before", "num_heads", "num_pages"])  # type: ignore[untyped-decorator]
def _pick(  # type: ignore[no-untyped-def]
    ratings_YRM,
    ids,
    fields_FY,
    indices_J,
    before,
    num_heads,
    num_pages,
    num_rows: tl.constexpr,
    page_size: tl.constexpr,
    padded_pages: tl.constexpr,
    are_logits: tl.constexpr,
) -> None:
    """One head per program. Pages that it does not have are never among the best: no page it has is rated so low."""
    head = tl.program_id(0).to(tl.int64)
    field = fields_FY + head
    length = tl.load(field + _LENGTH * num_heads)
    page_M = tl.arange(0, padded_pages)
    start_M = page_M.to(tl.int64) * page_size
    is_page_M = start_M < length
    rating_at_M = ratings_YRM + head * num_rows * num_pages + page_M
    if are_logits:
        num_tokens_M = tl.clamp((length - start_M).to(tl.float32), 1.0, page_size * 1.0)
        scores_M = _mass(rating_at_M, is_page_M, num_tokens_M, num_pages, num_rows, padded_pages)
    else:
        scores_M = tl.load(rating_at_M, mask=is_page_M, other=0.0)
    is_sure_M = (page_M == 0) | (is_page_M & (start_M + page_size >= length))
    keys_M = tl.where(is_sure_M, 0xFFFFFFFF, tl.where(is_page_M, _ordered(scores_M), 0))
    is_read_M = _are_best(keys_M, tl.load(field + _NUM_READ * num_heads).to(tl.int32))
    place_M = tl.cumsum(is_read_M.to(tl.int32), axis=0) - 1
    ids_M = tl.load(ids + tl.load(field + _TABLE * num_heads) + before + page_M, mask=is_read_M, other=0)
    tl.store(indices_J + tl.load(field + _BEGIN * num_heads) + place_M, ids_M, mask=is_read_M)


class TritonPageOps:
    """A `PageOps`."""

    def __init__(self) -> None:
        self._twin = TorchPageOps()

    def store(
        self, pool: PackedPool, bounds_NE: Tensor | None, layer: int, k_BKD: Tensor, v_BKD: Tensor, places: TokenPlaces
    ) -> None:
        if isinstance(pool, PLAIN_POOLS):
            store_tokens(pool, bounds_NE, layer, k_BKD, v_BKD, places)
        else:  # what codes pages does so in torch
            self._twin.store(pool, bounds_NE, layer, k_BKD, v_BKD, places)

    def rate(
        self, rule: PageRule, q_XGD: Tensor, scale: float, bounds_NE: Tensor, table: LayerTable, heads: SparseHeads
    ) -> Tensor:
        num_heads, num_pages, (_, group, head_dim) = heads.fields_FY.shape[1], heads.max_stored, q_XGD.shape
        num_rows, padded_dim = group if is_mass(rule) else 1, triton.next_power_of_2(head_dim)
        shape = (num_heads, num_rows, num_pages)
        ratings_YRM = torch.empty(shape, dtype=torch.float32, device=q_XGD.device)
        tile_pages = max(1, _TILE // (2 * padded_dim))
        _rate[(num_heads, triton.cdiv(num_pages, tile_pages))](
            q_XGD.contiguous(),
            bounds_NE,
            table.ids,
            heads.fields_FY,
            ratings_YRM,
            table.before,
            scale,
            num_heads,
            num_pages,
            heads.page_size,
            group,
            head_dim,
            padded_dim,
            tile_pages,
            is_mass(rule),
            min(rule.num_dims, head_dim),
        )
        return ratings_YRM

    def pick(
        self, ratings_YRM: Tensor, table: LayerTable, heads: SparseHeads, indices_J: Tensor, *, are_logits: bool
    ) -> None:
        num_heads, num_rows, num_pages = ratings_YRM.shape
        padded_pages = triton.next_power_of_2(num_pages)
        num_warps = min(max(padded_pages // _PAGES_PER_WARP, _MIN_WARPS), _MAX_WARPS)
        _pick[(num_heads,)](
            ratings_YRM.contiguous(),
            table.ids,
            heads.fields_FY,
            indices_J,
            table.before,
            num_heads,
            num_pages,
            num_rows,
            heads.page_size,
            padded_pages,
            are_logits,
            num_warps=num_warps,
        )
