"""The window's attention on the native kernel: keys are read where they lie in the pool, and never gathered.

Knows tensors and their addresses; what is computed stands in `native/src/window_attention.cpp`, and is what
`window.attention_given` computes of the same keys, up to the rounding of fp32 sums. Legend as in `window.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.compress.window import WindowAttention
from packlight.kv.pool import KVPool
from packlight.native.library import Library
from packlight.native.window import WindowArgs, scratch_bytes, window_attention

DTYPES = (torch.float32, torch.bfloat16)


class PagedWindow:
    """Over one pool, of a dtype in DTYPES and on the CPU. Keeps memory for the weights of one KV head's rows."""

    def __init__(self, pool: KVPool, library: Library) -> None:
        assert pool.dtype in DTYPES, pool.dtype
        assert pool.device.type == "cpu", pool.device
        self._pool, self._library = pool, library
        self._scratch = torch.empty(0)

    def attend(
        self, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor | None = None
    ) -> WindowAttention:
        """See `StoredWindow`."""
        pool, num_threads = self._pool, torch.get_num_threads()
        window, num_heads, head_dim = q_WHD.shape
        assert 1 <= window <= num_tokens <= len(blocks) * pool.page_size, (window, num_tokens, len(blocks))
        q_WHD, blocks = q_WHD.to(pool.dtype), blocks.contiguous()
        q_WHD = q_WHD if q_WHD.stride(2) == 1 else q_WHD.contiguous()
        mass_KS = torch.empty(pool.num_kv_heads, num_tokens)
        lse_HW = torch.empty(num_heads, window) if lse_WH is None else lse_WH.T.contiguous()
        num_rows, is_known = num_heads // pool.num_kv_heads * window, lse_WH is not None
        self._reserve(scratch_bytes(self._library, num_rows, num_tokens, head_dim, is_known, num_threads))
        args = WindowArgs(
            q=q_WHD.data_ptr(),
            k_pool=pool.k.data_ptr(),
            blocks=blocks.data_ptr(),
            mass=mass_KS.data_ptr(),
            lse=lse_HW.data_ptr(),
            scratch=self._scratch.data_ptr(),
            q_token_stride=q_WHD.stride(0),
            q_head_stride=q_WHD.stride(1),
            num_rows=window,
            num_keys=num_tokens,
            num_layers=pool.num_layers,
            layer=layer,
            num_heads=num_heads,
            num_kv_heads=pool.num_kv_heads,
            head_dim=head_dim,
            page_size=pool.page_size,
            scale=scale,
            is_bf16=pool.dtype == torch.bfloat16,
            lse_is_known=is_known,
            num_threads=num_threads,
        )
        window_attention(self._library, args)
        return WindowAttention(mass_KS, lse_HW.T)

    def _reserve(self, num_bytes: int) -> None:
        if self._scratch.nbytes < num_bytes:
            self._scratch = torch.empty(-(-num_bytes // 4))
