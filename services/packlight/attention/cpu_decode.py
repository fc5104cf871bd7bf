"""The decode step of the native backend: one call of the kernel per layer, or one per part where it needs help.

Knows addresses and strides. Legend as in `attention/base.py`, N rows of one part (`parts.py`), R rows of the table, C
pages read per head, M pages per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, LayerQueries
from packlight.attention.chosen import ChosenPages
from packlight.attention.parts import Part, Parts
from packlight.attention.scratch import Scratch
from packlight.attention.stores import NewTokens
from packlight.kv.coded import CodedPool
from packlight.kv.pool import KVPool
from packlight.kv.reading import PageRating, Reading, RuledReader
from packlight.kv.table import Int32s
from packlight.native.decode import (
    MASS_OF_REPRESENTATIVES,
    SUM_OF_BOUNDS,
    DecodeArguments,
    DecodeKernel,
    reads_records,
)

_RATINGS = {
    PageRating.SUM_OF_BOUNDS: SUM_OF_BOUNDS,
    PageRating.MASS_OF_REPRESENTATIVES: MASS_OF_REPRESENTATIVES,
}


@dataclass(frozen=True, eq=False, slots=True)
class LayerStep:
    """What the model hands to one layer, and where the answer goes. `out_THD` is contiguous; in the others each head's
    numbers are."""

    layer: int
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor
    scale: float
    sliding_window: int | None


class CpuDecode:
    """`k_THD` and the others are of the pool's dtype, which is one the kernel knows."""

    def __init__(self, batch: DecodeBatch, kernel: DecodeKernel) -> None:
        self._batch = batch
        self._run = self._way(batch, kernel)

    @staticmethod
    def _way(batch: DecodeBatch, kernel: DecodeKernel) -> Callable[[LayerStep], None]:
        """The shortest that the batch allows."""
        if not all(_is_ruled(reading) for reading in batch.reads):
            return ChosenRows(batch, kernel).run
        if isinstance(batch.pool, KVPool):
            return every_row(batch, kernel, batch.pool.k_pages, batch.pool.v_pages).store_and_run
        if isinstance(batch.pool, CodedPool) and _reads_records(batch.pool):
            return CodedRows(batch, batch.pool, kernel).run
        return ChosenRows(batch, kernel).run

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        q, k, v = (_heads_unbroken(x) for x in (q_THD, k_TKD, v_TKD))
        self._run(LayerStep(layer, q, k, v, out_THD, scale, sliding_window))
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return out_THD


class KernelCall:
    """The kernel's arguments for N rows, filled in as far as they do not change from layer to layer.

    pages_RLKM: page ids. rows_N: which R of them. places_N: where these rows stand in the batch. lengths_NLK: tokens
    that are stored, the new one among them. new_index_NLK: which of them that is. reads: as in `DecodeBatch`, of
    readers whose rule the kernel knows; `bounds_NE` are the summaries that they go by."""

    def __init__(
        self,
        kernel: DecodeKernel,
        k_XPD: Tensor,
        v_XPD: Tensor,
        *,
        pages_RLKM: Int32s,
        rows_N: Int32s,
        places_N: Int32s,
        lengths_NLK: Int32s,
        new_index_NLK: Int32s,
        reads: Sequence[Reading | None] = (),
        bounds_NE: Tensor | None = None,
    ) -> None:
        self._kernel = kernel
        arrays = [np.ascontiguousarray(x) for x in (pages_RLKM, rows_N, places_N, lengths_NLK, new_index_NLK)]
        self._kept_alive = [k_XPD, v_XPD, bounds_NE, *arrays]
        pages, rows, places, lengths, new_index = (array.ctypes.data for array in arrays)
        self._arguments = DecodeArguments(
            k_pages=k_XPD.data_ptr(),
            v_pages=v_XPD.data_ptr(),
            is_bf16=k_XPD.dtype is torch.bfloat16,
            num_layers=lengths_NLK.shape[1],
            num_kv_heads=lengths_NLK.shape[2],
            page_size=k_XPD.shape[1],
            head_dim=k_XPD.shape[2],
            num_rows=len(rows_N),
            pages=pages,
            pages_per_head=pages_RLKM.shape[-1],
            table_rows=rows,
            places=places,
            lengths=lengths,
            new_index=new_index,
        )
        if bounds_NE is not None:
            self._read_sparsely(reads, bounds_NE)

    def _read_sparsely(self, reads: Sequence[Reading | None], bounds_NE: Tensor) -> None:
        rules = np.array([_rule_of(reading) for reading in reads], dtype=np.int32)
        ratings, num_dims, max_pages, num_dense_layers = columns = [rules[:, i].copy() for i in range(rules.shape[1])]
        self._kept_alive += columns
        arguments = self._arguments
        arguments.bounds, arguments.ratings = bounds_NE.data_ptr(), ratings.ctypes.data
        arguments.num_dims, arguments.max_pages = num_dims.ctypes.data, max_pages.ctypes.data
        arguments.num_dense_layers = num_dense_layers.ctypes.data

    def read_records(self, pool: CodedPool) -> None:
        """The pages given are the open ones of `pool`; the others are its records."""
        layout, memory, arguments = pool.integer_records, pool.memory, self._arguments
        assert layout is not None
        self._kept_alive += memory
        arguments.records, arguments.record_bytes = memory.records_NR.data_ptr(), memory.records_NR.shape[1]
        arguments.states = memory.state_N.data_ptr()
        arguments.bits, arguments.value_group = layout.bits, layout.value_group

    def store_and_run(self, step: LayerStep) -> None:
        """Store the rows' new tokens and attend."""
        arguments, k, v = self._arguments, step.k_TKD, step.v_TKD
        arguments.k, arguments.v = k.data_ptr(), v.data_ptr()
        arguments.k_row_stride, arguments.k_head_stride, _ = k.stride()
        arguments.v_row_stride, arguments.v_head_stride, _ = v.stride()
        self.run(step, step.layer)

    def run(self, step: LayerStep, layer: int) -> None:
        """Attend to what is stored. `layer` is that of the tables."""
        arguments, q = self._arguments, step.q_THD
        arguments.layer, arguments.scale, arguments.window = layer, step.scale, step.sliding_window or 0
        arguments.num_threads = torch.get_num_threads()
        arguments.group = q.shape[1] // arguments.num_kv_heads
        arguments.q, arguments.out = q.data_ptr(), step.out_THD.data_ptr()
        arguments.q_row_stride, arguments.q_head_stride, _ = q.stride()
        self._kernel(arguments)


def every_row(batch: DecodeBatch, kernel: DecodeKernel, k_XPD: Tensor, v_XPD: Tensor) -> KernelCall:
    """All rows of the batch, as they are stored."""
    rows = list(batch.rows)
    is_sparse = any(reading is not None for reading in batch.reads)
    return KernelCall(
        kernel,
        k_XPD,
        v_XPD,
        pages_RLKM=batch.table.pages,
        rows_N=np.array(rows, dtype=np.int32),
        places_N=np.arange(len(rows), dtype=np.int32),
        lengths_NLK=batch.table.new_lengths(rows),
        new_index_NLK=batch.table.new_index(rows),
        reads=batch.reads,
        bounds_NE=batch.summaries.bounds_NE if is_sparse and batch.summaries is not None else None,
    )


class CodedRows:
    """Integer records are read as they lie. New tokens are stored by the pool, which codes pages that become full."""

    def __init__(self, batch: DecodeBatch, pool: CodedPool, kernel: DecodeKernel) -> None:
        self._new_tokens = NewTokens(batch)
        self._every_row = every_row(batch, kernel, pool.memory.k_open_OPD, pool.memory.v_open_OPD)
        self._every_row.read_records(pool)

    def run(self, step: LayerStep) -> None:
        self._new_tokens.store(step.layer, step.k_TKD, step.v_TKD, step.sliding_window)
        self._every_row.run(step, step.layer)


class ChosenRows:
    """Batches of which the kernel does not know everything. New tokens are stored, pages chosen and coded pages decoded
    by torch; the kernel attends to what that leaves."""

    def __init__(self, batch: DecodeBatch, kernel: DecodeKernel) -> None:
        self._pool, self._kernel = batch.pool, kernel
        self._new_tokens, self._parts, self._chosen = NewTokens(batch), Parts(batch), ChosenPages(batch)
        self._k, self._v = (Scratch(batch.pool.dtype, batch.pool.device) for _ in range(2))

    def run(self, step: LayerStep) -> None:
        self._new_tokens.store(step.layer, step.k_TKD, step.v_TKD, step.sliding_window)
        for part in self._parts.of(step.layer, step.sliding_window):
            self._call(part, step).run(step, 0)

    def _call(self, part: Part, step: LayerStep) -> KernelCall:
        """Of a table with one layer, whose pages are those that are read."""
        q_NHD, num_kv_heads = step.q_THD[part.index], step.k_TKD.shape[1]
        q_NKGD = q_NHD.reshape(len(q_NHD), num_kv_heads, -1, q_NHD.shape[-1])
        pages_NKC = self._chosen.of(part, step.layer, q_NKGD, step.scale)
        k_XPD, v_XPD, ids_NKC = self._memory(pages_NKC)
        places_N = np.arange(len(step.q_THD), dtype=np.int32)[part.index]
        lengths_N1K = part.read_lengths(step.layer)[:, None]
        return KernelCall(
            self._kernel,
            k_XPD,
            v_XPD,
            pages_RLKM=ids_NKC[:, None],
            rows_N=np.arange(len(places_N), dtype=np.int32),
            places_N=places_N,
            lengths_NLK=lengths_N1K,
            new_index_NLK=lengths_N1K - 1,
        )

    def _memory(self, pages_NKC: Tensor) -> tuple[Tensor, Tensor, Int32s]:
        """Pages as numbers, K and V, and which of them are to be read: in the pool, or in a copy if it is coded."""
        if isinstance(self._pool, KVPool):
            return self._pool.k_pages, self._pool.v_pages, pages_NKC.int().numpy()
        shape = (pages_NKC.numel(), self._pool.page_size, self._pool.head_dim)
        k_XPD, v_XPD = self._k.take(*shape), self._v.take(*shape)
        self._pool.gather(pages_NKC.flatten(), k_XPD, v_XPD)
        return k_XPD, v_XPD, np.arange(shape[0], dtype=np.int32).reshape(pages_NKC.shape)


def _reads_records(pool: CodedPool) -> bool:
    layout = pool.integer_records
    return layout is not None and reads_records(
        bits=layout.bits, value_group=layout.value_group, page_size=pool.page_size, head_dim=pool.head_dim
    )


def _is_ruled(reading: Reading | None) -> bool:
    return reading is None or isinstance(reading.reader, RuledReader)


def _rule_of(reading: Reading | None) -> tuple[int, int, int, int]:
    """How the kernel is told of it: rating, dims, pages and dense layers."""
    if reading is None:
        return 0, 0, 0, 0
    assert isinstance(reading.reader, RuledReader)
    rule = reading.reader.rule
    return _RATINGS[rule.rating], rule.num_dims, reading.num_pages, reading.num_dense_layers


def _heads_unbroken(x_TXD: Tensor) -> Tensor:
    """With each head's numbers one after another, which they usually are."""
    return x_TXD if x_TXD.stride(-1) == 1 else x_TXD.contiguous()
