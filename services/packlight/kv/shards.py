"""Pages of a pool that is divided by KV head: every shard has its own pages, and its own books.

Knows page numbers and which head belongs to which shard. Does not know where a shard lives. With n shards of m pages
and K KV heads, shard s has the pages `[s * m, (s + 1) * m)` and the heads `[s * K / n, (s + 1) * K / n)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from packlight.kv.pages import OutOfPages, PageBook, PageIds
from packlight.kv.summaries import SummaryWriter


@runtime_checkable
class SummarisedPool(Protocol):
    """A pool whose shards have the summaries of their pages themselves."""

    @property
    def summaries(self) -> SummaryWriter: ...


class ShardedPageBook:
    """The books of `num_pages` head pages in `num_shards` shards; a head gets pages of its shard. Same rules as
    `PageBook`, and the same threads: one owner calls it."""

    def __init__(self, num_pages: int, *, num_shards: int, num_kv_heads: int) -> None:
        assert num_pages % num_shards == num_kv_heads % num_shards == 0, (num_pages, num_kv_heads, num_shards)
        self.num_pages, self._num_heads = num_pages, num_kv_heads // num_shards
        self._size = num_pages // num_shards
        self._books = [PageBook(self._size) for _ in range(num_shards)]

    @property
    def num_free(self) -> int:
        return sum(book.num_free for book in self._books)

    @property
    def num_held(self) -> int:
        return sum(book.num_held for book in self._books)

    def allocate_for(self, heads: npt.NDArray[np.intp]) -> PageIds:
        """A page for each entry of `heads`. Raises OutOfPages, and takes none, if a shard has too few."""
        shards = heads // self._num_heads
        wanted = np.bincount(shards, minlength=len(self._books))
        for shard, (book, count) in enumerate(zip(self._books, wanted, strict=True)):
            if count > book.num_free:
                raise OutOfPages(f"{count} KV pages of shard {shard} wanted, {book.num_free} of {self._size} are free")
        pages = np.empty(len(heads), dtype=np.int32)
        for shard, (book, count) in enumerate(zip(self._books, wanted, strict=True)):
            pages[shards == shard] = book.allocate(int(count)) + shard * self._size
        return pages

    def release(self, pages: PageIds) -> None:
        for book, own in zip(self._books, self._by_shard(pages), strict=True):
            book.release(own)

    def check(self, tables: Iterable[PageIds] | None = None) -> None:
        """Raise InternalError if the books do not balance. `tables` are all page lists that hold a reference now."""
        split = None if tables is None else [self._by_shard(table) for table in tables]
        for shard, book in enumerate(self._books):
            book.check(None if split is None else [own[shard] for own in split])

    def _by_shard(self, pages: PageIds) -> list[PageIds]:
        """Numbers within each shard."""
        return [pages[pages // self._size == shard] - shard * self._size for shard in range(len(self._books))]


def open_book(num_pages: int, *, num_shards: int, num_kv_heads: int) -> PageBook | ShardedPageBook:
    """The books of a pool's head pages, all free."""
    if num_shards == 1:
        return PageBook(num_pages)
    return ShardedPageBook(num_pages, num_shards=num_shards, num_kv_heads=num_kv_heads)
