"""bfloat16 on the wire, whatever the pool's dtype: half the bytes of an fp32 pool, eight bits of mantissa."""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.compress.codecs.native import NativeCodec


class BF16Codec:
    def encode(self, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        return NativeCodec().encode(k_pages.bfloat16(), v_pages.bfloat16())

    def decode(
        self, payload: Tensor, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        k_pages, v_pages = NativeCodec().decode(payload, num_pages, page_size, head_dim, torch.bfloat16)
        return k_pages.to(pool_dtype), v_pages.to(pool_dtype)

    def payload_bytes(self, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype) -> int:
        return NativeCodec().payload_bytes(num_pages, page_size, head_dim, torch.bfloat16)
