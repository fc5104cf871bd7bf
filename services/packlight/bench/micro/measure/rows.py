"""Rows of packed KV without a prompt: random numbers in the pool, table and summaries that a decode worker has.

Knows pools, tables and readings. Knows no model and no backend. The head pages of a row lie as they do in a worker that
has served for a while: others came and went before, grew, and left their pages in another order.

Legend: X head pages, P page size, D head dim; L layers, K KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from packlight.compress.parts import CODECS
from packlight.compress.payload import tokens_per_page
from packlight.compress.readers.shared import Readers
from packlight.core.types import ModelSpec, PackSpec
from packlight.kv.coded import CodedPool
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool, PackedPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable

_TILE_PAGES = 1024
_NUM_TURNS, _MAX_GROWN_PAGES = 4, 16
NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Layout:
    """How KV lies, and where: `codec` is `native`, or that of a coded pool."""

    page_size: int
    dtype: torch.dtype
    codec: str = NATIVE
    device: str = "cpu"


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """`rows` of `table`, each with room for its next token. Full pages take `page_bytes`."""

    pool: PackedPool
    table: HeadPageTable
    rows: tuple[int, ...]
    page_bytes: int
    summaries: PageSummaries | None = None
    reading: Reading | None = None

    def reads(self, num_rows: int) -> tuple[Reading | None, ...]:
        """For a `DecodeBatch` of the first so many rows."""
        return () if self.reading is None else (self.reading,) * num_rows

    def layer_bytes(self, layer: int, num_rows: int) -> int:
        """Bytes of KV, and of summaries, that the attention of one step has to read in a layer."""
        lengths = self.table.new_lengths(list(self.rows[:num_rows]))[:, layer]
        num_pages = -(-lengths // self.pool.page_size)
        if self.reading is None or layer < self.reading.num_dense_layers:
            return int(lengths.sum()) * self.page_bytes // self.pool.page_size
        is_sparse = num_pages > self.reading.num_pages
        num_read = np.where(is_sparse, self.reading.num_pages, num_pages)
        summary_bytes = 2 * self.pool.head_dim * self.pool.dtype.itemsize
        return int(num_read.sum()) * self.page_bytes + int(num_pages[is_sparse].sum()) * summary_bytes


def make_rows(
    spec: ModelSpec,
    layout: Layout,
    lengths_LK: Sequence[Sequence[int]],
    *,
    num_rows: int,
    num_new: int = 1,
    num_spare_rows: int = 0,
    pack: PackSpec | None = None,
    num_prompt_tokens: int = 0,
    seed: int = 0,
) -> Rows:
    """`num_rows` rows with `lengths_LK` tokens each, and pages for `num_new` more; spare rows are free, with a page for
    each of their heads. With `pack` they are read as a
    prompt of `num_prompt_tokens` that was packed so."""
    num_pages = sum(-(-(length + num_new) // layout.page_size) for lengths in lengths_LK for length in lengths)
    num_spare_pages = num_spare_rows * spec.num_layers * spec.num_kv_heads
    pool, page_bytes = _make_pool(spec, layout, num_rows, num_rows * num_pages + num_spare_pages)
    table = HeadPageTable(
        PageBook(pool.num_head_pages),
        num_rows=num_rows + num_spare_rows,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        page_size=layout.page_size,
    )
    _serve_others(table, lengths_LK, num_rows, layout.page_size, seed)
    reading = None
    if pack is not None:
        readers = Readers(num_rows=num_rows, page_size=layout.page_size, head_dim=spec.head_dim)
        reading = readers.reading_of(pack, num_prompt_tokens)
    summaries = None
    if reading is not None:
        summaries = PageSummaries(pool.num_head_pages, spec.head_dim, layout.dtype, layout.device)
    rows = tuple(table.open() for _ in range(num_rows))
    _fill(pool, table, rows, lengths_LK, summaries, seed)
    table.grow(list(rows))
    return Rows(pool, table, rows, page_bytes, summaries, reading)


def _make_pool(spec: ModelSpec, layout: Layout, num_rows: int, num_head_pages: int) -> tuple[PackedPool, int]:
    num_heads = spec.num_layers * spec.num_kv_heads
    num_blocks = -(-num_head_pages // num_heads)
    if layout.codec == NATIVE:
        native = KVPool(
            spec, num_blocks=num_blocks, page_size=layout.page_size, dtype=layout.dtype, device=layout.device
        )
        return native, native.head_page_bytes
    coded = CodedPool(
        spec,
        CODECS.load(layout.codec)(),
        num_blocks=num_blocks,
        max_open_pages=2 * num_rows * num_heads,
        page_size=layout.page_size,
        dtype=layout.dtype,
        device=layout.device,
    )
    return coded, coded.head_page_bytes


def _serve_others(
    table: HeadPageTable, lengths_LK: Sequence[Sequence[int]], num_rows: int, page_size: int, seed: int
) -> None:
    """Requests of other lengths take rows, grow by some pages side by side, and leave in any order, again and again."""
    generator = np.random.default_rng(seed)
    num_grown_pages = min(length for lengths in lengths_LK for length in lengths) // page_size // 8
    for _ in range(_NUM_TURNS):
        rows = [table.open() for _ in range(num_rows)]
        for row in rows:
            share = generator.uniform(0.1, 0.8)
            for layer, lengths in enumerate(lengths_LK):
                table.fill_layer(row, layer, [int(share * length) // page_size * page_size for length in lengths])
        for _ in range(min(num_grown_pages, _MAX_GROWN_PAGES)):
            table.grow(rows)
            table.lengths[rows] += page_size
        for row in generator.permutation(rows):
            table.close(int(row))


def _fill(
    pool: PackedPool,
    table: HeadPageTable,
    rows: Sequence[int],
    lengths_LK: Sequence[Sequence[int]],
    summaries: PageSummaries | None,
    seed: int,
) -> None:
    """Random tokens everywhere: the same `_TILE_PAGES` pages over and over, because randomness takes time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_TILE_PAGES, pool.page_size, pool.head_dim)
    k_tile, v_tile = (torch.randn(shape, generator=generator).to(pool.device, pool.dtype) for _ in range(2))
    for row in rows:
        for layer, lengths in enumerate(lengths_LK):
            pages_X = torch.from_numpy(table.fill_layer(row, layer, list(lengths))).long().to(pool.device)
            num_tokens_X = tokens_per_page(lengths, pool.page_size).to(pool.device)
            for start in range(0, len(pages_X), _TILE_PAGES):
                part, num_tokens = (x_X[start : start + _TILE_PAGES] for x_X in (pages_X, num_tokens_X))
                k, v = k_tile[: len(part)], v_tile[: len(part)]
                pool.write_pages(part, k, v, num_tokens)
                if summaries is not None:
                    summaries.build(part, k, num_tokens)
