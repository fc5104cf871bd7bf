"""The FlashInfer backend: what outlives a step, and which kind of step a batch is.

Owns the kernels (a kernel holds one plan, so there are as many as there are plans in a step) and the mirrors of the
head-page tables that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from packlight.attention.base import AttentionPlan, DecodeBatch, FixedPlan, FixedShape, PrefillBatch
from packlight.attention.flashinfer.decode import FlashInferDecode
from packlight.attention.flashinfer.fixed import FixedDecode
from packlight.attention.flashinfer.kernels import DecodeKernel, Kernels, PrefillKernel
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.ops import PageOps, page_ops
from packlight.attention.flashinfer.prefill import FlashInferPrefill
from packlight.attention.flashinfer.site import stored_dtype
from packlight.attention.flashinfer.wrappers import FlashInferKernels
from packlight.kv.pool import PackedPool
from packlight.kv.table import HeadPageTable

K = TypeVar("K")


class FlashInferAttention:
    def __init__(self, device: str = "cuda", kernels: Kernels | None = None, ops: PageOps | None = None) -> None:
        """`kernels` are FlashInfer's on `device` unless others are given, and `ops` the fastest there. Raises
        ConfigError where FlashInfer's cannot be had."""
        self._device = torch.device(device)
        self.kernels, self._ops = kernels or FlashInferKernels.on(self._device), ops or page_ops(self._device)
        self._decode = Shelf[DecodeKernel](self.kernels.decode)
        self._prefill = Shelf[PrefillKernel](self.kernels.prefill)
        self._mirrors: WeakKeyDictionary[HeadPageTable, TableMirror] = WeakKeyDictionary()

    def require(self, head_dim: int, dtype: torch.dtype) -> None:
        """Raises ConfigError for a model that the kernels cannot compute."""
        self.kernels.limits.refuse(head_dim, dtype, dtype)

    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        """Raises ConfigError for a pool that the kernels cannot read."""
        self._require(batch.pool)
        if isinstance(batch, PrefillBatch):
            return FlashInferPrefill(batch, self._prefill)
        return FlashInferDecode(batch, self._mirror(batch.table, batch.pool), self._decode, self._ops)

    def reserve(self, table: HeadPageTable, pool: PackedPool, num_pages: int) -> None:
        self._mirror(table, pool).reserve(num_pages)

    def fixed_plan(self, batch: DecodeBatch, shape: FixedShape) -> FixedPlan:
        """Raises ConfigError for a pool that the kernels cannot read."""
        self._require(batch.pool)
        return FixedDecode(batch, shape, self._mirror(batch.table, batch.pool), self.kernels, self._ops)

    def _require(self, pool: PackedPool) -> None:
        self.kernels.limits.refuse(pool.head_dim, pool.dtype, stored_dtype(pool))

    def _mirror(self, table: HeadPageTable, pool: PackedPool) -> TableMirror:
        if table not in self._mirrors:
            self._mirrors[table] = TableMirror(table, pool.page_size, pool.device)
        return self._mirrors[table]


class Shelf(list[K]):
    """Kernels that are made when they are first needed and used again in every step."""

    def __init__(self, make: Callable[[], K]) -> None:
        super().__init__()
        self._make = make

    def __call__(self, index: int) -> K:
        """Indices come in order."""
        if index == len(self):
            self.append(self._make())
        return self[index]
