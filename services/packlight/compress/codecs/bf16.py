"""bfloat16, whatever the pool's dtype: half the bytes of an fp32 pool, eight bits of significand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.codecs.native import NativeCodec
from packlight.compress.codecs.records import to_dtype


class BF16Codec:
    is_exact = False

    def __init__(self) -> None:
        self._native = NativeCodec()

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return self._native.record_bytes(page_size, head_dim, torch.bfloat16)

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        return self._native.encode(to_dtype(k_PTD, torch.bfloat16), to_dtype(v_PTD, torch.bfloat16), pages_per_head)

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_PTD, v_PTD = self._native.decode(records, page_size, head_dim, torch.bfloat16)
        return to_dtype(k_PTD, dtype), to_dtype(v_PTD, dtype)
