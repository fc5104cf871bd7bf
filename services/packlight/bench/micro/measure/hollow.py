"""A model that computes nothing and attention that only stores: what is left of a request is moving its KV.

Knows the model and attention seams. Workers around them run every line of the real path but the arithmetic.

Legend: T tokens of the step, H query heads, K KV heads, D head dim, R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import AttentionPlan, DecodeBatch, LayerQueries, PrefillBatch
from packlight.attention.stores import NewTokens, chunk_places
from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink


class HollowModel:
    """K and V are random numbers, the same for every token; the next token is always the first of the vocabulary."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(0)
        kv = torch.randn(2, 1, spec.num_kv_heads, spec.head_dim, generator=generator).to(getattr(torch, spec.dtype))
        self._k_1KD, self._v_1KD = kv

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        k_TKD, v_TKD = (x_1KD.expand(len(tokens_T), -1, -1) for x_1KD in (self._k_1KD, self._v_1KD))
        for layer in range(self.spec.num_layers):
            batch.attend(layer, k_TKD, k_TKD, v_TKD, scale=1.0, sliding_window=None)
        logits_RV = torch.zeros(len(logits_at_R), self.spec.vocab_size)
        logits_RV[:, 0] = 1.0
        return logits_RV


class StoreOnly:
    """An attention backend without attention."""

    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        return _StorePrefill(batch) if isinstance(batch, PrefillBatch) else _StoreDecode(batch)


class _StorePrefill:
    def __init__(self, batch: PrefillBatch) -> None:
        self._batch = batch
        self._blocks_T, self._offsets_T = chunk_places(batch)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._batch.pool.write_blocks(layer, self._blocks_T, self._offsets_T, k_TKD, v_TKD)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return q_THD


class _StoreDecode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch, self._new_tokens = batch, NewTokens(batch)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._new_tokens.store(layer, k_TKD, v_TKD, sliding_window)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return q_THD
