"""Splitting a decode step into parts: rows that are read densely, and rows that share a reader.

Knows lengths and readings, so everything here is settled before any layer runs; which pages a reader prefers is asked
in each layer. Legend as in `attention/base.py`, P page size, N rows of one part, C pages read per head, S tokens there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.choice import PageChoice
from packlight.attention.masks import additive
from packlight.attention.stores import stored_pages
from packlight.kv.reading import PageReader
from packlight.kv.table import Int32s


class Part:
    """Rows that are read alike, in every layer that splits the batch in this way.

    index: their places in the batch. rows: their rows of the table. reader: None where every page is read."""

    def __init__(self, batch: DecodeBatch, index: Sequence[int], reader: PageReader | None) -> None:
        self.index = slice(None) if len(index) == len(batch.rows) else list(index)
        self.rows, self.reader = [batch.rows[i] for i in index], reader
        self._page_size, self._dtype, self._device = batch.pool.page_size, batch.pool.dtype, batch.pool.device
        self._lengths_NLK = batch.table.new_lengths(self.rows)
        self._num_pages_NLK = -(-self._lengths_NLK // self._page_size)
        self._num_read_NLK = self._num_pages_NLK
        if reader is not None:
            budgets = [reading.num_pages for reading in (batch.reads[i] for i in index) if reading is not None]
            self._num_read_NLK = np.minimum(self._num_pages_NLK, np.array(budgets, dtype=np.int32)[:, None, None])
        self._pages_NLKM = stored_pages(batch, self.rows, self._num_pages_NLK)
        # Layers whose heads have the same lengths, which often are all, share what follows from them.
        self._masks: dict[tuple[bytes, int | None], Tensor | None] = {}
        self._choices: dict[bytes, tuple[PageChoice, Tensor]] = {}

    def pages(self, layer: int) -> Tensor:
        """All pages `[N, K, M]` int64; heads that have fewer than M are filled up with their first."""
        return self._pages_NLKM[:, layer, :, : self._num_pages_NLK[:, layer].max()]

    def read_lengths(self, layer: int) -> Int32s:
        """Tokens on the pages that each head reads, `[N, K]`."""
        num_unread_NK = self._num_pages_NLK[:, layer] - self._num_read_NLK[:, layer]
        lengths_NK: Int32s = self._lengths_NLK[:, layer] - num_unread_NK * self._page_size
        return lengths_NK

    def choice(self, layer: int) -> tuple[PageChoice, Tensor]:
        """Who chooses among `pages`, and how many tokens are on each of them: `[N, K, M]` int64, 0 on those that only
        fill up."""
        key = self._lengths_NLK[:, layer].tobytes()
        if key not in self._choices:
            choice = PageChoice(self._num_pages_NLK[:, layer], self._num_read_NLK[:, layer], self._device)
            self._choices[key] = choice, self._num_tokens(layer)
        return self._choices[key]

    def mask(self, layer: int, sliding_window: int | None) -> Tensor | None:
        """`[N, K, 1, S]` for the pages read, the last page last; None where every token on them is seen."""
        key = self._lengths_NLK[:, layer].tobytes(), sliding_window
        if key not in self._masks:
            self._masks[key] = self._make_mask(layer, sliding_window)
        return self._masks[key]

    def _num_tokens(self, layer: int) -> Tensor:
        start_M = np.arange(self._num_pages_NLK[:, layer].max()) * self._page_size
        num_tokens_NKM = np.clip(self._lengths_NLK[:, layer, :, None] - start_M, 0, self._page_size)
        return torch.from_numpy(num_tokens_NKM).to(self._device)

    def _make_mask(self, layer: int, sliding_window: int | None) -> Tensor | None:
        length_NK11 = self.read_lengths(layer)[:, :, None, None]
        index_S = np.arange(self._num_read_NLK[:, layer].max() * self._page_size)
        seen = index_S < length_NK11
        if sliding_window:
            seen &= index_S >= length_NK11 - sliding_window
        return None if seen.all() else additive(torch.from_numpy(seen).to(self._device), self._dtype)


class Parts:
    """The parts of one step, layer by layer."""

    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._is_sparse_BL = _sparse_layers(batch)
        self._splits: dict[bytes, list[Part]] = {}

    def of(self, layer: int, sliding_window: int | None) -> list[Part]:
        """Every row of the batch is in one of them. Layers that split alike get the same parts."""
        is_sparse_B = self._is_sparse_BL[:, layer] & (sliding_window is None)
        key = is_sparse_B.tobytes()
        if key not in self._splits:
            self._splits[key] = self._split(is_sparse_B)
        return self._splits[key]

    def _split(self, is_sparse_B: npt.NDArray[np.bool_]) -> list[Part]:
        shares: dict[int, tuple[PageReader | None, list[int]]] = {}
        for index in range(len(self._batch.rows)):
            reading = self._batch.reads[index] if is_sparse_B[index] else None
            reader = None if reading is None else reading.reader
            shares.setdefault(id(reader), (reader, []))[1].append(index)
        return [Part(self._batch, index, reader) for reader, index in shares.values()]


def _sparse_layers(batch: DecodeBatch) -> npt.NDArray[np.bool_]:
    """`[B, L]`: where a head of the row has more pages than it may read."""
    lengths_BLK = batch.table.new_lengths(list(batch.rows))
    most_pages_BL = -(-lengths_BLK.max(axis=2) // batch.pool.page_size)
    is_sparse_BL = np.zeros(most_pages_BL.shape, dtype=np.bool_)
    for index, reading in enumerate(batch.reads):
        if reading is not None:
            is_sparse_BL[index] = most_pages_BL[index] > reading.num_pages
            is_sparse_BL[index, : reading.num_dense_layers] = False
    return is_sparse_BL
