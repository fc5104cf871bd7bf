"""Head-page tables of the running batch: which pages hold the packed KV of which request, layer and KV head.

Knows rows, page numbers and lengths (array arithmetic, no tensors, no bytes). One permanent row per running request.

Legend: R rows, L layers, K KV heads, M pages per head at most.

    pages      [R, L, K, M] int32   head page ids; only the first ceil(length / page_size) of a head mean anything
    lengths    [R, L, K]    int32   tokens stored. Lengths differ by layer and head (that is what packing is), so they
                                    are *not* positions: RoPE, stop limits and usage count positions instead.
    overwrite  [R, L, K]    int32   index of the stored token whose place the next token takes, -1 to append. Eviction
                                    while decoding sets it between two steps; such a head does not grow.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from packlight.kv.pages import PageIds

Int32s = npt.NDArray[np.int32]


class HeadPageBook(Protocol):
    """Where head pages come from, and go back to."""

    def allocate_for(self, heads: npt.NDArray[np.intp]) -> PageIds:
        """A page for each entry of `heads`, the KV head that it is for. Raises OutOfPages and takes none."""
        ...

    def release(self, pages: PageIds) -> None: ...


class HeadPageTable:
    """Rows of head pages out of `book`. Not thread-safe: one owner calls it."""

    def __init__(
        self, book: HeadPageBook, *, num_rows: int, num_layers: int, num_kv_heads: int, page_size: int
    ) -> None:
        self._book, self._page_size = book, page_size
        shape = (num_rows, num_layers, num_kv_heads)
        self.pages: Int32s = np.zeros((*shape, 1), dtype=np.int32)
        self.lengths: Int32s = np.zeros(shape, dtype=np.int32)
        self.overwrite: Int32s = np.full(shape, -1, dtype=np.int32)
        self._num_pages: Int32s = np.zeros(shape, dtype=np.int32)
        self.lives = np.zeros(num_rows, dtype=np.int64)  # how often each row was opened: pages only grow within a life
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def open(self) -> int:
        """A fresh row with all lengths 0."""
        row = self._free_rows.pop()
        self.lives[row] += 1
        return row

    def fill_layer(self, row: int, layer: int, lengths: list[int]) -> PageIds:
        """Allocate pages for `lengths[head]` tokens of one layer; returns them, head 0's first."""
        counts = [-(-length // self._page_size) for length in lengths]
        pages = self._book.allocate_for(np.repeat(np.arange(len(counts)), counts))
        self._reserve_columns(max(counts, default=0))
        start = 0
        for head, count in enumerate(counts):
            self.pages[row, layer, head, :count] = pages[start : start + count]
            start += count
        self.lengths[row, layer], self._num_pages[row, layer] = lengths, counts
        return pages

    def grow(self, rows: list[int]) -> None:
        """Make room for the next token in every head of `rows`: a page wherever it is appended and the last is full."""
        num_pages = self._num_pages[rows]
        index = np.nonzero(self.new_lengths(rows) > num_pages * self._page_size)
        if len(index[0]) == 0:
            return
        self._reserve_columns(int(num_pages.max()) + 1)
        heads = (np.asarray(rows)[index[0]], index[1], index[2])
        self.pages[(*heads, self._num_pages[heads])] = self._book.allocate_for(index[2])
        self._num_pages[heads] += 1

    def new_lengths(self, rows: list[int]) -> Int32s:
        """`[B, L, K]`: tokens stored in the heads of `rows` once each has its next token."""
        lengths: Int32s = self.lengths[rows] + (self.overwrite[rows] < 0)
        return lengths

    def new_index(self, rows: list[int]) -> Int32s:
        """`[B, L, K]`: which of a head's stored tokens the next one will be."""
        overwrite = self.overwrite[rows]
        return np.where(overwrite < 0, self.lengths[rows], overwrite)

    def advance(self, rows: list[int]) -> None:
        """One token was stored in every head of `rows`; the next one is appended unless `overwrite` is set again."""
        self.lengths[rows] = self.new_lengths(rows)
        self.overwrite[rows] = -1

    def num_pages(self, row: int) -> int:
        return int(self._num_pages[row].sum())

    def held(self, row: int) -> PageIds:
        """All head pages of a row."""
        used = np.arange(self.pages.shape[-1]) < self._num_pages[row][..., None]
        held: PageIds = self.pages[row][used]
        return held

    def close(self, row: int) -> None:
        """Release the row and its pages."""
        self._book.release(self.held(row))
        self.lengths[row] = self._num_pages[row] = 0
        self.overwrite[row] = -1
        self._free_rows.append(row)

    def _reserve_columns(self, num_columns: int) -> None:
        if num_columns > self.pages.shape[-1]:
            wider = np.zeros((*self.pages.shape[:-1], max(num_columns, 2 * self.pages.shape[-1])), dtype=np.int32)
            wider[..., : self.pages.shape[-1]] = self.pages
            self.pages = wider
