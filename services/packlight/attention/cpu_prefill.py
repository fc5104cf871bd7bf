"""Prefill on the native kernel: chunks attend to their prompts' blocks where they lie.

Knows tensors and their addresses; what is computed stands in `native/src/prefill_attention*`. A token's output depends
on its prompt alone, bit for bit: not on the chunks it was cut into, the batch around it, or the number of threads.
Legend as in `attention/base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import LayerQueries, PrefillBatch
from packlight.attention.scratch import Scratch
from packlight.native.library import Library
from packlight.native.prefill import ChunkArgs, PrefillArgs, prefill_attention, scratch_bytes

DTYPES = (torch.float32, torch.bfloat16)


class CpuPrefill:
    def __init__(self, batch: PrefillBatch, library: Library) -> None:
        assert batch.pool.dtype in DTYPES, batch.pool.dtype
        self._batch, self._library = batch, library
        self._blocks = [chunk.blocks.contiguous() for chunk in batch.chunks]  # kept: the kernel is given addresses
        self._chunks = (ChunkArgs * len(batch.chunks))(
            *(
                ChunkArgs(chunk.start, chunk.num_tokens, chunk.num_context, blocks.data_ptr())
                for chunk, blocks in zip(batch.chunks, self._blocks, strict=True)
            )
        )
        self._scratch = Scratch(torch.float32, batch.pool.device)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        out_THD, lse_TH = torch.empty(q_THD.shape, dtype=self._batch.pool.dtype), torch.empty(q_THD.shape[:2])
        q, k, v = (self._readable(x_TXD) for x_TXD in (q_THD, k_TKD, v_TKD))
        self._run(layer, q, k, v, out_THD, lse_TH, scale, sliding_window)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale, lse_TH))
        return out_THD.to(q_THD.dtype)

    def _readable(self, x_TXD: Tensor) -> Tensor:
        """Of the pool's dtype, each head's numbers side by side; tokens and heads may lie anywhere."""
        x_TXD = x_TXD.to(self._batch.pool.dtype)
        return x_TXD if x_TXD.stride(2) == 1 else x_TXD.contiguous()

    def _run(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        pool, num_threads = self._batch.pool, torch.get_num_threads()
        num_tokens, num_heads, head_dim = q_THD.shape
        num_bytes = scratch_bytes(self._library, num_heads, pool.num_kv_heads, head_dim, num_threads)
        args = PrefillArgs(
            q=q_THD.data_ptr(),
            k=k_TKD.data_ptr(),
            v=v_TKD.data_ptr(),
            out=out_THD.data_ptr(),
            lse=lse_TH.data_ptr(),
            k_pool=pool.k.data_ptr(),
            v_pool=pool.v.data_ptr(),
            scratch=self._scratch.take(num_bytes // 4).data_ptr(),
            chunks=self._chunks,
            q_token_stride=q_THD.stride(0),
            q_head_stride=q_THD.stride(1),
            k_token_stride=k_TKD.stride(0),
            k_head_stride=k_TKD.stride(1),
            v_token_stride=v_TKD.stride(0),
            v_head_stride=v_TKD.stride(1),
            num_chunks=len(self._chunks),
            num_tokens=num_tokens,
            sliding_window=window or 0,
            num_layers=pool.num_layers,
            layer=layer,
            num_heads=num_heads,
            num_kv_heads=pool.num_kv_heads,
            head_dim=head_dim,
            page_size=pool.page_size,
            scale=scale,
            is_bf16=pool.dtype == torch.bfloat16,
            num_threads=num_threads,
        )
        prefill_attention(self._library, args)
