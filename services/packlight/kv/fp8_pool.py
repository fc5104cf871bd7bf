"""Packed KV as FP8 numbers without scales, laid out as in the plain pool: kernels that read FP8 read it in place.

Knows the plain pool's layout and E4M3 (OCP 8-bit floating point: numbers up to 448, a relative error of 2^-4 at most
from 2^-6 on, below that steps of 2^-9). Numbers beyond 448 become 448. The codec `fp8` is finer for small numbers,
because it scales them, but its pages have to be decoded before they are read. Legend as in `kv/pool.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.core.types import ModelSpec
from packlight.kv.pages import PageIds
from packlight.kv.pool import blocks_that_fit, store_pages, zeros_on_first_touch

E4M3 = torch.float8_e4m3fn


class FP8Pool:
    """A `PackedPool` that computes in `dtype` and stores one byte per number. `k_pages` and `v_pages` are the memory,
    E4M3 `[N*L*K, P, D]`."""

    num_shards = 1

    def __init__(
        self, spec: ModelSpec, *, num_blocks: int, page_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.num_blocks, self.page_size, self.dtype, self.device = num_blocks, page_size, dtype, torch.device(device)
        self.num_layers, self.num_kv_heads, self.head_dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        shape = (self.num_head_pages, page_size, self.head_dim)
        # Many of torch's operations know bytes, but not FP8.
        self._k_bytes, self._v_bytes = (zeros_on_first_touch(shape, torch.uint8, device) for _ in range(2))
        self.k_pages, self.v_pages = self._k_bytes.view(E4M3), self._v_bytes.view(E4M3)

    @classmethod
    def of_size(
        cls, spec: ModelSpec, *, memory_bytes: int, page_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> FP8Pool:
        """As many blocks as fit into `memory_bytes`. Raises ConfigError if not even one does."""
        num_blocks = blocks_that_fit(spec, memory_bytes, page_size, E4M3)
        return cls(spec, num_blocks=num_blocks, page_size=page_size, dtype=dtype, device=device)

    @property
    def num_head_pages(self) -> int:
        return self.num_blocks * self.num_layers * self.num_kv_heads

    @property
    def memory_bytes(self) -> int:
        return 2 * self._k_bytes.numel()

    def write_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        store_pages(self._k_bytes, pages_X, _to_bytes(k_XPD))
        store_pages(self._v_bytes, pages_X, _to_bytes(v_XPD))

    def append(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        self._k_bytes.view(-1, self.head_dim).index_copy_(0, slots_X, _to_bytes(k_XD))
        self._v_bytes.view(-1, self.head_dim).index_copy_(0, slots_X, _to_bytes(v_XD))

    def gather(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        k_XPD.copy_(self._k_bytes.index_select(0, pages_X).view(E4M3))
        v_XPD.copy_(self._v_bytes.index_select(0, pages_X).view(E4M3))

    def release(self, pages: PageIds) -> None:
        """Nothing to do: a head page's memory is its own, and is written before it is read."""


def _to_bytes(x: Tensor) -> Tensor:
    limit = torch.finfo(E4M3).max
    return x.clamp(-limit, limit).to(E4M3).view(torch.uint8)
