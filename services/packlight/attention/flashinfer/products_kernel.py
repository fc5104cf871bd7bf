"""The Triton kernel behind `bounds.py`. Imported only where Triton is.

Bound by memory: each summary is read once, at its own address, and multiplied by all rows of the probe in fp32. (Tensor
cores would round to tf32, which decides among pages whose bounds lie close together.) Pages that a head does not have
are neither read nor left undefined: their products are 0.

Legend as in `bounds.py`, Y = n * K heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of summaries that one program holds at once: 32 pages of head dim 128.
_TILE = 8192


# Triton reads annotations, and knows no types but its own. Rows that grow are no reason to compile anew.
@triton.jit(do_not_specialize=["num_pages"])  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    probe_YGE,
    bounds_NE,
    pages_YM,
    num_stored_Y,
    out_YGM,
    num_pages,
    group: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    tile_pages: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    page_M = tl.program_id(1) * tile_pages + tl.arange(0, tile_pages)
    is_stored_M = page_M < tl.load(num_stored_Y + head)
    ids_M = tl.load(pages_YM + head * num_pages + page_M, mask=is_stored_M, other=0).to(tl.int64)
    place_E = tl.arange(0, padded_width)
    is_there_E = place_E < width
    bounds_ME = tl.load(
        bounds_NE + ids_M[:, None] * width + place_E[None, :],
        mask=is_stored_M[:, None] & is_there_E[None, :],
        other=0.0,
    ).to(tl.float32)
    for row in tl.static_range(group):
        probe_E = tl.load(probe_YGE + (head * group + row) * width + place_E, mask=is_there_E, other=0.0)
        products_M = tl.sum(bounds_ME * probe_E[None, :], axis=1)
        tl.store(out_YGM + (head * group + row) * num_pages + page_M, products_M, mask=page_M < num_pages)


def page_products(probe_nKGE: Tensor, bounds_NE: Tensor, pages_nKM: Tensor, num_stored_nK: Tensor) -> Tensor:
    """fp32 `[n, K, G, M]`. All arguments are contiguous; the probe is fp32, page ids and counts are integers."""
    num_rows, num_kv_heads, group, width = probe_nKGE.shape
    num_pages = pages_nKM.shape[-1]
    padded_width = triton.next_power_of_2(width)
    tile_pages = max(1, _TILE // padded_width)
    shape = (num_rows, num_kv_heads, group, num_pages)
    out_nKGM = torch.empty(shape, dtype=torch.float32, device=probe_nKGE.device)
    grid = (num_rows * num_kv_heads, triton.cdiv(num_pages, tile_pages))
    _products[grid](
        probe_nKGE, bounds_NE, pages_nKM, num_stored_nK, out_nKGM, num_pages, group, width, padded_width, tile_pages
    )
    return out_nKGM
