"""One rank's share of the packed KV: the pages of its heads, and what it takes to read them.

Every rank has one for each pool, the first as well as its followers; all do the same with what they are told. A KV
head's pages, summaries and reader are in one place, so whatever looks at one head at a time needs no other rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.readers.shared import Readers
from packlight.engine.parallel.messages import Int64s
from packlight.engine.parallel.readings import ReadingMirror
from packlight.engine.parallel.tables import TableMirror, TableUpdate
from packlight.engine.runner import DecodeRunner
from packlight.kv.summaries import PageSummaries


class PackedShare:
    """`runner`'s pool holds the rank's heads of `num_rows` rows; page numbers are within it."""

    def __init__(self, runner: DecodeRunner, *, num_rows: int) -> None:
        self.pool = pool = runner.pool
        self._runner = runner
        self._table = TableMirror(
            num_rows=num_rows, num_layers=pool.num_layers, num_kv_heads=pool.num_kv_heads, page_size=pool.page_size
        )
        self.summaries = PageSummaries(pool.num_head_pages, pool.head_dim, pool.dtype, str(pool.device))
        self._readings = ReadingMirror(Readers(page_size=pool.page_size, head_dim=pool.head_dim, num_rows=num_rows))

    def decode(
        self, token_ids: Sequence[int], positions: Sequence[int], table: TableUpdate, told_readings: str
    ) -> Tensor:
        """This rank's part of a step of the rows of `table`, as `DecodeRunner.decode`."""
        rows = table.rows_B.tolist()
        self._table.apply(table)
        self._readings.apply(table.fresh_rows, told_readings)
        reads = self._readings.of(rows)
        return self._runner.decode(self._table, rows, token_ids, positions, reads=reads, summaries=self.summaries)

    def update_of(self, arrays: Sequence[Int64s]) -> TableUpdate:
        """The one that travelled as `TableUpdate.arrays`."""
        return TableUpdate.of_arrays(arrays, self.pool.num_layers, self.pool.num_kv_heads)

    def store(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        self.pool.write_pages(pages_X, k_XPD, v_XPD)

    def summarise(self, pages_X: Tensor, num_tokens_X: Tensor) -> None:
        """Pages that were stored: their summaries are made of what is there."""
        shape = (len(pages_X), self.pool.page_size, self.pool.head_dim)
        k_XPD, v_XPD = (torch.empty(shape, dtype=self.pool.dtype, device=self.pool.device) for _ in range(2))
        self.pool.gather(pages_X, k_XPD, v_XPD)
        self.summaries.build(pages_X, k_XPD, num_tokens_X)
