"""The Triton kernel behind `device_window.py`. Imported only where Triton is.

One program takes a tile of keys of one KV head, read once and where they lie, and multiplies it by the window's rows
(`tl.dot`, summed in fp32), some rows at a time. A row's log-sum-exp is known, so its weights are final as they are
made: they are added up and never stored. Keys that a row does not see, and rows and dimensions that only fill up a
tile, count for nothing, whatever lies in memory there.

Legend as in `window.py`, T keys of a tile, R rows of a turn, row r being (query head r // W of the group, token r % W).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of keys and the turns of queries beside it have to fit the memory of a multiprocessor; a turn's scores, up to
# 128 x 64 in fp32, its registers. Sixteen is the least that a product takes.
_TILE_BYTES, _MAX_KEYS, _MAX_ROWS, _MIN_SIDE = 32 << 10, 128, 64, 16
_LOG2_E = math.log2(math.e)


# Triton reads annotations, and knows no types but its own. A prompt's length is no reason to compile anew.
@triton.jit(do_not_specialize=["num_keys", "window"])  # type: ignore[untyped-decorator]
def _sum_weights(  # type: ignore[no-untyped-def]
    q_WHD,
    k_layer,
    blocks,
    lse_WH,
    mass_KS,
    q_token_stride,
    q_head_stride,
    lse_token_stride,
    lse_head_stride,
    block_stride,
    num_keys,
    window,
    scale,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    page_size: tl.constexpr,
    tile_keys: tl.constexpr,
    turn_rows: tl.constexpr,
    log2_e: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    key_T = tl.program_id(1) * tile_keys + tl.arange(0, tile_keys)
    place_D = tl.arange(0, padded_dim)
    is_key_T, is_there_D = key_T < num_keys, place_D < head_dim
    block_T = tl.load(blocks + key_T // page_size, mask=is_key_T, other=0)
    start_T = block_T * block_stride + (head * page_size + key_T % page_size) * head_dim
    at_TD = k_layer + start_T[:, None] + place_D[None, :]
    k_TD = tl.load(at_TD, mask=is_key_T[:, None] & is_there_D[None, :], other=0.0)
    mass_T = tl.zeros((tile_keys,), dtype=tl.float32)
    for first in range(0, group * window, turn_rows):
        row_R = first + tl.arange(0, turn_rows)
        is_row_R = row_R < group * window
        token_R, member_R = (row_R % window).to(tl.int64), head * group + row_R // window
        at_RD = q_WHD + (token_R * q_token_stride + member_R * q_head_stride)[:, None] + place_D[None, :]
        q_RD = tl.load(at_RD, mask=is_row_R[:, None] & is_there_D[None, :], other=0.0)
        lse_R = tl.load(lse_WH + token_R * lse_token_stride + member_R * lse_head_stride, mask=is_row_R, other=0.0)
        scores_TR = tl.dot(k_TD, tl.trans(q_RD), input_precision="ieee") * scale
        weights_TR = tl.exp2((scores_TR - lse_R[None, :]) * log2_e)
        is_seen_TR = is_row_R[None, :] & (key_T[:, None] <= (num_keys - window + token_R)[None, :])
        mass_T += tl.sum(tl.where(is_seen_TR, weights_TR, 0.0), axis=1)
    tl.store(mass_KS + head * num_keys + key_T, mass_T, mask=is_key_T)


def stored_mass(
    q_WHD: Tensor, k_NLKPD: Tensor, layer: int, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor
) -> Tensor:
    """fp32 `[K, S]`: `window.window_mass` of the keys of one layer of a pool, S = `num_tokens`.

    `q_WHD` is of the pool's dtype and has its dimensions side by side; `lse_WH` is fp32."""
    window, num_heads, head_dim = q_WHD.shape
    num_kv_heads, page_size = k_NLKPD.shape[2:4]
    mass_KS = torch.empty(num_kv_heads, num_tokens, dtype=torch.float32, device=q_WHD.device)
    group, padded_dim = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), _MIN_SIDE)
    tile_keys = min(max(_TILE_BYTES // (padded_dim * q_WHD.itemsize), _MIN_SIDE), _MAX_KEYS)
    _sum_weights[(num_kv_heads, triton.cdiv(num_tokens, tile_keys))](
        q_WHD,
        k_NLKPD[:, layer],
        blocks,
        lse_WH,
        mass_KS,
        *q_WHD.stride()[:2],
        *lse_WH.stride(),
        k_NLKPD.stride(0),
        num_tokens,
        window,
        scale,
        group,
        head_dim,
        padded_dim,
        page_size,
        tile_keys,
        min(max(triton.next_power_of_2(group * window), _MIN_SIDE), _MAX_ROWS),
        _LOG2_E,
    )
    return mass_KS
