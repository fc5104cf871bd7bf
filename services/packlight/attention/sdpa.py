"""The torch backend: `scaled_dot_product_attention` over pages gathered into contiguous memory.

Correct everywhere torch runs, and the default on CPU until the native kernel is there. Reading gathered pages costs one
copy of the KV per layer and step; the scratch it is copied into is allocated once per step and reused by every layer,
because fresh pages from the system cost more than the copy. Legend as in `attention/base.py`, P page size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.attention.base import AttentionPlan, DecodeBatch, PrefillBatch, PrefillChunk
from packlight.attention.reference import causal_mask
from packlight.attention.stores import append_slots, chunk_places, pages_and_lengths


class SdpaAttention:
    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        return SdpaPrefill(batch) if isinstance(batch, PrefillBatch) else SdpaDecode(batch)


class SdpaPrefill:
    def __init__(self, batch: PrefillBatch) -> None:
        self._batch = batch
        self._blocks_T, self._offsets_T = chunk_places(batch)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._batch.pool.write_blocks(layer, self._blocks_T, self._offsets_T, k_TKD, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for chunk in self._batch.chunks:
            rows = slice(chunk.start, chunk.start + chunk.num_tokens)
            k_KSD, v_KSD = self._stored(layer, chunk, k_TKD[rows], v_TKD[rows])
            out_THD[rows] = self._attend_chunk(chunk, q_THD[rows], k_KSD, v_KSD, scale, sliding_window)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, q_THD, scale)
        return out_THD

    def _stored(self, layer: int, chunk: PrefillChunk, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        if chunk.num_context == 0:
            return k_TKD.transpose(0, 1), v_TKD.transpose(0, 1)
        return self._batch.pool.read_blocks(layer, chunk.blocks, chunk.num_stored)

    def _attend_chunk(
        self, chunk: PrefillChunk, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        mask = self._mask(chunk, sliding_window)
        group = q_THD.shape[1] // k_KSD.shape[0]
        out_1HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            k_KSD.repeat_interleave(group, dim=0)[None],
            v_KSD.repeat_interleave(group, dim=0)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return out_1HTD[0].transpose(0, 1)

    def _mask(self, chunk: PrefillChunk, sliding_window: int | None) -> Tensor | None:
        """None where plain causality says it all; built once per step otherwise."""
        window = sliding_window if sliding_window and sliding_window < chunk.num_stored else None
        if chunk.num_context == 0 and window is None:
            return None
        key = (chunk.start, window)
        if key not in self._masks:
            self._masks[key] = additive(causal_mask(chunk, window, chunk.blocks.device), self._batch.pool.dtype)
        return self._masks[key]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, -inf elsewhere: what attention adds to its scores. Made once per step; torch would otherwise make
    it from booleans in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class SdpaDecode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._slots_BLK = append_slots(batch)
        self._pages_BLKM, self._lengths_BLK = pages_and_lengths(batch)
        pool, (rows, _, heads, columns) = batch.pool, self._pages_BLKM.shape
        shape = (rows * heads * columns, pool.page_size, pool.head_dim)
        self._k_scratch = torch.empty(shape, dtype=pool.dtype, device=pool.k.device)
        self._v_scratch = torch.empty_like(self._k_scratch)
        self._index_S = torch.arange(columns * pool.page_size, device=pool.k.device)
        self._is_uniform = bool((self._lengths_BLK == self._lengths_BLK[:, :1]).all())
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        pool = self._batch.pool
        pool.k_slots[self._slots_BLK[:, layer]] = k_TKD
        pool.v_slots[self._slots_BLK[:, layer]] = v_TKD
        q_BKGD = q_THD.view(len(q_THD), pool.num_kv_heads, -1, pool.head_dim)
        out_BKGD = F.scaled_dot_product_attention(
            q_BKGD,
            self._gather(pool.k_pages, layer, self._k_scratch),
            self._gather(pool.v_pages, layer, self._v_scratch),
            attn_mask=self._mask(layer, sliding_window),
            scale=scale,
        )
        return out_BKGD.flatten(1, 2)

    def _gather(self, pages: Tensor, layer: int, scratch: Tensor) -> Tensor:
        index_BKM = self._pages_BLKM[:, layer]
        torch.index_select(pages, 0, index_BKM.reshape(-1), out=scratch)
        return scratch.view(*index_BKM.shape[:2], -1, scratch.shape[-1])

    def _mask(self, layer: int, sliding_window: int | None) -> Tensor | None:
        """`[B, K, 1, S]`; None where every gathered token is seen. Layers with the same lengths share one."""
        key = (0 if self._is_uniform else layer, sliding_window)
        if key not in self._masks:
            length_BK11 = self._lengths_BLK[:, layer, :, None, None]
            seen = self._index_S < length_BK11
            if sliding_window:
                seen &= self._index_S >= length_BK11 - sliding_window
            self._masks[key] = None if bool(seen.all()) else additive(seen, self._batch.pool.dtype)
        return self._masks[key]
