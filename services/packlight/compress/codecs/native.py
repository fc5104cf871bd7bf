"""The pool's own dtype, bit for bit.

Shapes: P head pages, T tokens per page, D head dim. Copies only when K and V pages do not lie side by side already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt


class NativeCodec:
    def encode(self, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        if _are_halves(k_pages, v_pages):
            whole = k_pages.as_strided((2 * k_pages.numel(),), (1,))
        else:
            whole = torch.cat([k_pages.reshape(-1), v_pages.reshape(-1)])
        return whole.view(torch.uint8)

    def decode(
        self, payload: Tensor, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        expected = self.payload_bytes(num_pages, page_size, head_dim, pool_dtype)
        if payload.numel() != expected:
            raise ShipmentCorrupt(
                f"a payload of {payload.numel()} bytes, expected {expected}: 2 x {num_pages} pages of "
                f"{page_size} x {head_dim} {pool_dtype}"
            )
        k_pages, v_pages = _typed(payload, pool_dtype).view(2, num_pages, page_size, head_dim)
        return k_pages, v_pages

    def payload_bytes(self, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype) -> int:
        return 2 * num_pages * page_size * head_dim * pool_dtype.itemsize


def _are_halves(k_pages: Tensor, v_pages: Tensor) -> bool:
    """Whether V starts in the same storage exactly where K ends."""
    return (
        k_pages.is_contiguous()
        and v_pages.is_contiguous()
        and k_pages.dtype == v_pages.dtype
        and k_pages.untyped_storage().data_ptr() == v_pages.untyped_storage().data_ptr()
        and k_pages.storage_offset() + k_pages.numel() == v_pages.storage_offset()
    )


def _typed(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as numbers; copied only if they arrived at an address at which such numbers cannot lie."""
    aligned = payload.is_contiguous() and payload.storage_offset() % dtype.itemsize == 0
    if not aligned or payload.data_ptr() % dtype.itemsize:
        payload = payload.clone(memory_format=torch.contiguous_format)
    return payload.view(dtype)
