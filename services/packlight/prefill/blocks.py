"""The blocks of a prefill worker: which prompts hold them, and which are kept for prompts to come.

Knows the page book, the radix cache and who is told what the cache holds. Does not know tensors, steps or shipments.

The life of the blocks of one request (`[0, cached)` was in the radix cache, `[cached, n)` is computed):

    take     share the blocks of [0, cached), allocate blocks for [cached, n), evicting idle ones if need be
    step     write [done, done + chunk)
    retire   put the full pages of [0, done) into the cache, release everything; the partial last page is freed, and all
             of [cached, n) if the request failed
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packlight.core.errors import InternalError
from packlight.kv.pages import PageBook
from packlight.kv.radix import RadixCache
from packlight.prefill.inventory import Inventory, NoInventory
from packlight.prefill.scheduler import usable_hit
from packlight.prefill.task import Task


class Blocks:
    """Owned by one worker; called on its event loop only."""

    def __init__(self, num_blocks: int, page_size: int) -> None:
        self.book = PageBook(num_blocks)
        self.cache = RadixCache(self.book)
        self.inventory: Inventory = NoInventory()
        self._page_size = page_size

    @property
    def num_available(self) -> int:
        """Free, or in the cache and held by nobody."""
        return self.book.num_free + self.book.num_cached

    def is_coming(self, task: Task, others: Sequence[Task]) -> bool:
        """Whether the next page that `task` lacks is being computed for one of `others`, and `task` could use it.
        Hashes are chained: equal ones stand for equal prefixes."""
        next_page = len(self.cache.match(task.hashes))
        at_best = usable_hit(task.num_tokens, task.num_tokens, task.anchor, task.window, self._page_size)
        if task.needs_all_queries or (next_page + 1) * self._page_size > at_best:
            return False
        wanted = task.hashes[next_page]
        return any(wanted in other.hashes[next_page : next_page + 1] for other in others if not other.cancelled)

    def take(self, task: Task) -> bool:
        """Give `task` its blocks and say how much of it is cached, or leave everything as it was."""
        hit = self.cache.match(task.hashes)
        num_hit = 0 if task.needs_all_queries else len(hit) * self._page_size
        num_cached = usable_hit(num_hit, task.num_tokens, task.anchor, task.window, self._page_size)
        shared = hit[: num_cached // self._page_size]
        num_new = -(-task.num_tokens // self._page_size) - len(shared)
        self.book.share(shared)
        if self.book.num_free < num_new <= self.num_available:  # else what is cached would go for nothing
            self.inventory.evicted(self.cache.evict(num_new - self.book.num_free))
        if num_new > self.book.num_free:
            self.book.release(shared)
            return False
        task.blocks = np.concatenate([shared, self.book.allocate(num_new)])
        task.num_cached = task.num_done = num_cached
        return True

    def retire(self, task: Task) -> None:
        """The one way out of blocks: full pages stay in the cache, every reference goes.

        A number that is not finite shows in the last chunk at the latest, and may have come with any. In the cache it
        would fail whoever shares the prefix, so a task that failed leaves nothing there."""
        num_full = task.num_done // self._page_size if task.is_sound else 0
        if num_full:
            self.cache.insert(task.hashes[:num_full], task.blocks[:num_full])
            self.inventory.stored(task.hashes[:num_full])
        self.book.release(task.blocks)
        task.blocks = task.blocks[:0]

    def check_idle(self) -> None:
        """Raise InternalError unless nothing is held. A counter only: `check` takes time that grows with the pool."""
        if self.book.num_held:
            raise InternalError(f"no request is here, yet {self.book.num_held} blocks are held")

    def check(self, tasks: Sequence[Task]) -> None:
        """Verify the books against every task that holds blocks."""
        self.book.check([task.blocks for task in tasks])
        self.cache.check()
