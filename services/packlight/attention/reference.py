"""The reference backend: attention written out, one request and one head at a time, in float32.

Slow and obvious on purpose; every other backend is tested against it. Legend as in `attention/base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import AttentionPlan, DecodeBatch, PrefillBatch, PrefillChunk
from packlight.attention.stores import append_slots, chunk_places


class ReferenceAttention:
    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        return ReferencePrefill(batch) if isinstance(batch, PrefillBatch) else ReferenceDecode(batch)


class ReferencePrefill:
    def __init__(self, batch: PrefillBatch) -> None:
        self._batch = batch
        self._blocks_T, self._offsets_T = chunk_places(batch)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        pool = self._batch.pool
        pool.write_blocks(layer, self._blocks_T, self._offsets_T, k_TKD, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for chunk in self._batch.chunks:
            k_KSD, v_KSD = pool.read_blocks(layer, chunk.blocks, chunk.num_stored)
            rows = slice(chunk.start, chunk.start + chunk.num_tokens)
            mask = causal_mask(chunk, sliding_window, q_THD.device)
            out_THD[rows] = softmax_attention(q_THD[rows], k_KSD, v_KSD, scale, mask)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, q_THD, scale)
        return out_THD


class ReferenceDecode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._slots_BLK = append_slots(batch)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        pool, table = self._batch.pool, self._batch.table
        pool.k_slots[self._slots_BLK[:, layer]] = k_TKD
        pool.v_slots[self._slots_BLK[:, layer]] = v_TKD
        group = q_THD.shape[1] // pool.num_kv_heads
        out_THD = torch.empty_like(q_THD)
        for index, row in enumerate(self._batch.rows):
            for head in range(pool.num_kv_heads):
                length = int(table.lengths[row, layer, head]) + 1
                start = max(0, length - sliding_window) if sliding_window else 0
                pages = torch.from_numpy(table.pages[row, layer, head]).long()[: -(-length // pool.page_size)]
                k_SD = pool.k_pages[pages].flatten(0, 1)[start:length]
                v_SD = pool.v_pages[pages].flatten(0, 1)[start:length]
                heads = slice(head * group, (head + 1) * group)
                q_1GD = q_THD[index : index + 1, heads]
                out_THD[index, heads] = softmax_attention(q_1GD, k_SD[None], v_SD[None], scale, None)[0]
        return out_THD


def causal_mask(chunk: PrefillChunk, sliding_window: int | None, device: torch.device) -> Tensor:
    """`[T, S]`, True where a row may see a stored token."""
    row = torch.arange(chunk.num_context, chunk.num_stored, device=device)[:, None]
    column = torch.arange(chunk.num_stored, device=device)[None, :]
    seen = column <= row
    return seen & (row - column < sliding_window) if sliding_window else seen


def softmax_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float, mask_TS: Tensor | None) -> Tensor:
    """softmax(q k^T * scale) v in float32, returned in q's dtype: `[T, H, D]`."""
    group = q_THD.shape[1] // k_KSD.shape[0]
    k_HSD = k_KSD.float().repeat_interleave(group, dim=0)
    v_HSD = v_KSD.float().repeat_interleave(group, dim=0)
    scores_HTS = torch.einsum("thd,hsd->hts", q_THD.float(), k_HSD) * scale
    if mask_TS is not None:
        scores_HTS = scores_HTS.masked_fill(~mask_TS, float("-inf"))
    return torch.einsum("hts,hsd->thd", scores_HTS.softmax(-1), v_HSD).to(q_THD.dtype)
