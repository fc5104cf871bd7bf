"""The torch backend: `scaled_dot_product_attention` over pages gathered into contiguous memory.

Correct everywhere torch runs, and the default on CPU until the native kernel is there. Decode steps are in
`sdpa_decode.py`. Legend as in `attention/base.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.attention.base import AttentionPlan, DecodeBatch, LayerQueries, PrefillBatch, PrefillChunk
from packlight.attention.masks import additive, causal_mask
from packlight.attention.sdpa_decode import SdpaDecode
from packlight.attention.stores import chunk_places


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
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
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
