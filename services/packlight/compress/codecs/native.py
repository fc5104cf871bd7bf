"""The pool's own dtype, bit for bit.

Shapes: P head pages, T tokens per page, D head dim. A record is the K page, then the V page. Nothing is copied when the
pages already lie like that, as those of `pack` do, nor on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.codecs.records import numbers


class NativeCodec:
    is_exact = True

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * page_size * head_dim * dtype.itemsize

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        num_pages, page_numel = len(k_PTD), k_PTD[0].numel() if len(k_PTD) else 0
        if num_pages and _alternate(k_PTD, v_PTD):
            pages = k_PTD.as_strided((num_pages, 2 * page_numel), (2 * page_numel, 1))
        else:
            pages = torch.stack((k_PTD, v_PTD), dim=1).flatten(1)
        return pages.view(torch.uint8)

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_PTD, v_PTD = torch.unflatten(numbers(records, dtype), 1, (2, page_size, head_dim)).unbind(1)
        return k_PTD, v_PTD


def _alternate(k_PTD: Tensor, v_PTD: Tensor) -> bool:
    """Whether the pages lie in one storage as K, V, K, V, ... without gaps."""
    _, page_size, head_dim = k_PTD.shape
    page_numel = page_size * head_dim
    strides = (2 * page_numel, head_dim, 1)
    return (
        k_PTD.stride() == v_PTD.stride() == strides
        and k_PTD.dtype == v_PTD.dtype
        and k_PTD.untyped_storage().data_ptr() == v_PTD.untyped_storage().data_ptr()
        and k_PTD.storage_offset() + page_numel == v_PTD.storage_offset()
    )
