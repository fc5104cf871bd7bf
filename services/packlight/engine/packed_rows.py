"""Packed KV of a few requests in a pool of their own, decoded from without a decode worker.

For those who look at what packing does: shadow fidelity and evaluation. Same pool, table, readers and backend as a
decode worker's; no queue, no reservation, no network.

Legend: P head pages of a layer, T tokens per page, D head dim, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.readers.shared import Readers
from packlight.core.types import PackSpec
from packlight.engine.runner import Runner
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable


class PackedRows:
    """Rows for the model and backend of `runner`: `open` one, `store` its layers in order, then `decode`."""

    def __init__(self, runner: Runner, *, num_rows: int, num_head_pages: int) -> None:
        spec, page_size, device = runner.model.spec, runner.pool.page_size, runner.pool.device
        num_blocks = -(-num_head_pages // (spec.num_layers * spec.num_kv_heads))
        pool = KVPool(spec, num_blocks=num_blocks, page_size=page_size, dtype=runner.pool.dtype, device=str(device))
        self.table = HeadPageTable(
            PageBook(pool.num_head_pages),
            num_rows=num_rows,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            page_size=page_size,
        )
        self._runner = Runner(runner.model, pool, runner.backend)
        self._readers = Readers(num_rows=num_rows, page_size=page_size, head_dim=spec.head_dim)
        self._summaries = PageSummaries(pool.num_head_pages, spec.head_dim, pool.dtype, str(device))
        self._readings: dict[int, Reading | None] = {}

    def open(self, pack: PackSpec, num_prompt_tokens: int) -> int:
        """A fresh row, to be read as `pack` says."""
        row = self.table.open()
        self._readings[row] = self._readers.reading_of(pack, num_prompt_tokens)
        return row

    def store(self, row: int, layer: int, lengths: Sequence[int], k_PTD: Tensor, v_PTD: Tensor) -> None:
        """`lengths[head]` tokens of each KV head, the pages of head 0 first."""
        pool, page_size = self._runner.pool, self._runner.pool.page_size
        pages = torch.from_numpy(self.table.fill_layer(row, layer, list(lengths))).long().to(pool.device)
        pool.write_pages(pages, k_PTD, v_PTD)
        if self._readings[row] is not None:
            counts = [min(page_size, length - start) for length in lengths for start in range(0, length, page_size)]
            self._summaries.build(pages, k_PTD, torch.tensor(counts, device=pool.device))

    def reading(self, row: int) -> Reading | None:
        """How the row is read; None: all of it."""
        return self._readings[row]

    def close(self, row: int) -> None:
        self.table.close(row)
        self._readers.forget(row)
        del self._readings[row]

    def decode(self, rows: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Store one token per row and return the logits `[R, V]` after it."""
        self.table.grow(list(rows))
        reads = tuple(self._readings[row] for row in rows)
        logits_RV = self._runner.decode(self.table, rows, token_ids, positions, reads=reads, summaries=self._summaries)
        self.table.advance(list(rows))
        return logits_RV
