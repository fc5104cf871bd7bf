"""Head-page tables of several processes: each holds the rows of the batch for its own KV heads.

Knows numbers only. The first process owns the whole table; before a step it tells every rank, itself included, what is
new since the last one: lengths, and the pages that were added. A row's pages only grow within its life, so that is all.

Legend: B rows of a step, L layers, K KV heads of the rank, M pages per head at most, X new pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packlight.engine.parallel.messages import Int64s
from packlight.kv.pages import PageBook
from packlight.kv.table import HeadPageTable, Int32s


@dataclass(frozen=True, eq=False, slots=True)
class TableUpdate:
    """`is_fresh_B`: the row was opened anew since it was last told of. `lengths_BLK`: stored before the step.
    `pages_X`: numbers within the rank's pool, row by row, layer by layer, head by head."""

    rows_B: Int64s
    is_fresh_B: npt.NDArray[np.bool_]
    lengths_BLK: Int64s
    pages_X: Int64s

    @property
    def fresh_rows(self) -> list[int]:
        rows: list[int] = self.rows_B[self.is_fresh_B].tolist()
        return rows

    def arrays(self) -> tuple[Int64s, ...]:
        return self.rows_B, self.is_fresh_B.astype(np.int64), self.lengths_BLK.flatten(), self.pages_X

    @classmethod
    def of_arrays(cls, arrays: Sequence[Int64s], num_layers: int, num_kv_heads: int) -> TableUpdate:
        rows_B, is_fresh_B, lengths, pages_X = arrays
        return cls(rows_B, is_fresh_B.astype(np.bool_), lengths.reshape(-1, num_layers, num_kv_heads), pages_X)


class TableSender:
    """Remembers what the ranks were told of `table`'s rows. `num_pages` is the whole pool's."""

    def __init__(self, *, num_ranks: int, num_pages: int, page_size: int) -> None:
        self._num_ranks, self._rank_pages, self._page_size = num_ranks, num_pages // num_ranks, page_size
        self._lives: dict[int, int] = {}
        self._told: dict[int, Int64s] = {}

    def updates(self, table: HeadPageTable, rows: Sequence[int]) -> list[TableUpdate]:
        """By rank, of `rows`, which have room for their next token."""
        assert (table.overwrite[list(rows)] < 0).all(), "rows of several processes do not overwrite"
        is_fresh_B = np.array([self._lives.get(row) != table.lives[row] for row in rows])
        lengths_BLK = table.lengths[list(rows)].astype(np.int64)
        now_BLK = num_pages_with_next(lengths_BLK, self._page_size)
        nothing_LK = np.zeros_like(now_BLK[0])
        before_BLK = np.stack(
            [nothing_LK if fresh else self._told[row] for row, fresh in zip(rows, is_fresh_B, strict=True)]
        )
        for row, now_LK in zip(rows, now_BLK, strict=True):
            self._lives[row], self._told[row] = int(table.lives[row]), now_LK
        rows_B = np.array(rows, dtype=np.int64)
        return [
            TableUpdate(
                rows_B, is_fresh_B, lengths_BLK[..., heads], self._new_pages(table, rows_B, rank, heads, now, was)
            )
            for rank, heads in enumerate(head_slices(now_BLK.shape[-1], self._num_ranks))
            for now, was in ((now_BLK[..., heads], before_BLK[..., heads]),)
        ]

    def _new_pages(
        self, table: HeadPageTable, rows_B: Int64s, rank: int, heads: slice, now_BLK: Int64s, before_BLK: Int64s
    ) -> Int64s:
        place, layer, head, ordinal = added_pages(before_BLK, now_BLK)
        pages_X: Int64s = table.pages[rows_B[place], layer, head + heads.start, ordinal].astype(np.int64)
        return pages_X - rank * self._rank_pages


class TableMirror(HeadPageTable):
    """One rank's copy, for its own heads. It allocates nothing."""

    def __init__(self, *, num_rows: int, num_layers: int, num_kv_heads: int, page_size: int) -> None:
        super().__init__(
            PageBook(0), num_rows=num_rows, num_layers=num_layers, num_kv_heads=num_kv_heads, page_size=page_size
        )

    def apply(self, update: TableUpdate) -> None:
        rows_B = update.rows_B
        self.lives[rows_B] += update.is_fresh_B
        before_BLK = np.where(update.is_fresh_B[:, None, None], 0, self._num_pages[rows_B])
        now_BLK = num_pages_with_next(update.lengths_BLK, self._page_size)
        self._reserve_columns(int(now_BLK.max()))
        place, layer, head, ordinal = added_pages(before_BLK, now_BLK)
        self.pages[rows_B[place], layer, head, ordinal] = update.pages_X
        self.lengths[rows_B], self._num_pages[rows_B] = update.lengths_BLK, now_BLK


def head_slices(num_kv_heads: int, num_ranks: int) -> list[slice]:
    """Which KV heads each rank has."""
    size = num_kv_heads // num_ranks
    return [slice(rank * size, (rank + 1) * size) for rank in range(num_ranks)]


def num_pages_with_next(lengths_BLK: Int64s, page_size: int) -> Int64s:
    """Pages of each head once it has its next token."""
    return lengths_BLK // page_size + 1


def added_pages(before_BLK: Int64s | Int32s, now_BLK: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """(row, layer, head, ordinal) of every page beyond the first `before_BLK`, `[X]` each, in this order."""
    num_new = (now_BLK - before_BLK).flatten()
    place, layer, head = (np.repeat(index.flatten(), num_new) for index in np.indices(now_BLK.shape))
    first_X: Int64s = np.repeat(np.cumsum(num_new) - num_new, num_new)
    ordinal: Int64s = np.arange(len(first_X), dtype=np.int64) - first_X + np.repeat(before_BLK.flatten(), num_new)
    return place, layer, head, ordinal
