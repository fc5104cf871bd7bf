"""Prefill on FlashInfer: the chunks' tokens are stored in blocks, then each prompt attends to its blocks causally.

Knows blocks, which are the same pages in every layer: so a layer is a view of the pool, and one plan serves all layers
with the same window. Legend as in `attention/base.py`, J listed blocks of all chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import LayerQueries, PrefillBatch
from packlight.attention.flashinfer.kernels import KernelShape, PageCounts, PrefillKernel
from packlight.attention.stores import chunk_places


class FlashInferPrefill:
    """`kernel(i)` is the i-th kernel of a step: one for each window there is."""

    def __init__(self, batch: PrefillBatch, kernel: Callable[[int], PrefillKernel]) -> None:
        self._batch, self._kernel = batch, kernel
        self._blocks_T, self._offsets_T = chunk_places(batch)
        self._planned: dict[tuple[int | None, float], PrefillKernel] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        pool = self._batch.pool
        pool.write_blocks(layer, self._blocks_T, self._offsets_T, k_TKD.to(pool.dtype), v_TKD.to(pool.dtype))
        kernel = self._plan(q_THD, scale, sliding_window)
        memory = pool.k[:, layer], pool.v[:, layer]
        if self._batch.on_layer is None:
            return kernel.run(q_THD.contiguous(), *memory)
        out_THD, lse_TH = kernel.run_with_lse(q_THD.contiguous(), *memory)
        self._batch.on_layer(layer, LayerQueries(q_THD, scale, lse_TH))
        return out_THD

    def _plan(self, q_THD: Tensor, scale: float, sliding_window: int | None) -> PrefillKernel:
        key = (sliding_window, scale)
        if key not in self._planned:
            pool, num_heads = self._batch.pool, q_THD.shape[1]
            group = num_heads // pool.num_kv_heads
            shape = KernelShape(group, pool.head_dim, pool.page_size, q_THD.dtype, pool.dtype, scale, sliding_window)
            kernel = self._kernel(len(self._planned))
            num_tokens_N, counts, blocks_J = block_lists(self._batch)
            kernel.plan(num_tokens_N, counts, blocks_J, shape, num_heads)
            self._planned[key] = kernel
        return self._planned[key]


def block_lists(batch: PrefillBatch) -> tuple[np.ndarray, PageCounts, Tensor]:
    """The new tokens of each chunk, the blocks that hold what it sees, and their ids, int32 on the device."""
    page_size = batch.pool.page_size
    num_stored_N = np.array([chunk.num_stored for chunk in batch.chunks], dtype=np.int32)
    num_tokens_N = np.array([chunk.num_tokens for chunk in batch.chunks], dtype=np.int32)
    counts = PageCounts(-(-num_stored_N // page_size), (num_stored_N - 1) % page_size + 1)
    blocks = [chunk.blocks[:count] for chunk, count in zip(batch.chunks, counts.num_pages_N.tolist(), strict=True)]
    return num_tokens_N, counts, torch.cat(blocks).int()
