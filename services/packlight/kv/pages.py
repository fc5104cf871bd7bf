"""Pages: who holds which page of KV memory.

Knows page numbers and reference counts. Does not know tensors, requests, hashes or the network.

Every page is in exactly one state:

    free ──allocate──▶ held (refs >= 1) ──release──▶ cached (refs == 0, kept by a cache) ──drop──▶ free
                         ▲                             │ share
                         └─────────────────────────────┘
    a held page that no cache keeps goes straight back to free on its last release.

`check()` verifies the books: free + held + cached == num_pages, and that reference counts match the given tables.
The unit is the owner's: whole blocks on prefill, head pages on decode. Numbers are kept in arrays because one packed
request holds tens of thousands of head pages.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from packlight.core.errors import CapacityError, InternalError

PageIds = npt.NDArray[np.int32]


class OutOfPages(CapacityError):
    """Fewer free pages than asked for. The caller evicts, waits or refuses; nothing was allocated."""


class PageBook:
    """The books of `num_pages` pages. Not thread-safe: one owner calls it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._refs = np.zeros(num_pages, dtype=np.int32)
        self._kept = np.zeros(num_pages, dtype=np.bool_)
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # free pages; the top is at num_free - 1
        self.num_free = num_pages
        self.num_cached = 0

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free - self.num_cached

    @property
    def num_kept(self) -> int:
        """Pages that a cache keeps, held by a request at the same time or not."""
        return int(self._kept.sum())

    def allocate(self, num_pages: int) -> PageIds:
        """Take `num_pages` free pages, each with one reference. Raises OutOfPages and takes none."""
        if num_pages > self.num_free:
            raise OutOfPages(f"{num_pages} KV pages wanted, {self.num_free} of {self.num_pages} are free")
        self.num_free -= num_pages
        # In rising order, so that a head's pages lie in runs: memory is read faster forwards (docs/benchmarks.md).
        pages = np.sort(self._stack[self.num_free : self.num_free + num_pages])
        self._refs[pages] = 1
        return pages

    def allocate_for(self, heads: npt.NDArray[np.intp]) -> PageIds:
        """As `allocate`, a page for each entry of `heads`, the KV head it is for: here any page serves any head."""
        return self.allocate(len(heads))

    def share(self, pages: PageIds) -> None:
        """One more reference to each of `pages`, which are held or cached. A page occurs at most once."""
        refs = self._refs[pages]
        self._require(bool((refs > 0).all() or self._kept[pages[refs == 0]].all()), "share of a free page")
        self.num_cached -= int((refs == 0).sum())
        self._refs[pages] += 1

    def release(self, pages: PageIds) -> None:
        """One reference less to each of `pages`. A page occurs at most once."""
        self._require(bool((self._refs[pages] > 0).all()), "release of a page that nobody holds")
        self._refs[pages] -= 1
        idle = pages[self._refs[pages] == 0]
        self.num_cached += int(self._kept[idle].sum())
        self._free(idle[~self._kept[idle]])

    def keep(self, page: int) -> None:
        """A cache keeps `page`, which is held: on its last release it becomes cached instead of free."""
        self._require(self._refs[page] > 0 and not self._kept[page], "keep of a page that is not held")
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The cache gives `page` up; it is freed now, or on its last release."""
        self._require(bool(self._kept[page]), "drop of a page that no cache keeps")
        self._kept[page] = False
        if self._refs[page] == 0:
            self.num_cached -= 1
            self._free(np.array([page], dtype=np.int32))

    def refs(self, page: int) -> int:
        return int(self._refs[page])

    def is_idle(self, page: int) -> bool:
        """Cached, and held by nobody: evictable."""
        return bool(self._kept[page]) and self._refs[page] == 0

    def check(self, tables: Iterable[PageIds] | None = None) -> None:
        """Raise InternalError if the books do not balance. `tables` are all page lists that hold a reference now."""
        free = self._stack[: self.num_free]
        occurs = np.bincount(free, minlength=self.num_pages)
        self._require(int(occurs.max(initial=0)) <= 1, "a page is free twice")
        self._require(not self._refs[free].any() and not self._kept[free].any(), "a free page is held or kept")
        cached = int((self._kept & (self._refs == 0)).sum())
        held = int((self._refs > 0).sum())
        self._require(cached == self.num_cached, f"{cached} pages are cached, the books say {self.num_cached}")
        self._require(self.num_free + held + cached == self.num_pages, "free + held + cached != all")
        if tables is not None:
            counts = np.zeros(self.num_pages, dtype=np.int32)
            for table in tables:
                np.add.at(counts, table, 1)
            self._require(bool((counts == self._refs).all()), "reference counts do not match the tables")

    def _free(self, pages: PageIds) -> None:
        self._stack[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)

    @staticmethod
    def _require(condition: bool, what: str) -> None:
        if not condition:
            raise InternalError(f"KV page books: {what}")
