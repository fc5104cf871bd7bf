"""The prefix index of a fleet that lives in one process: radix trees in this process's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from packlight.core.config import IndexConfig
from packlight.core.hashing import PageHash
from packlight.core.workers import WorkerId
from packlight.prefix.base import Holder
from packlight.prefix.radix import RadixTree


class MemoryPrefixIndex:
    """PrefixIndex over one RadixTree per model fingerprint. Always available."""

    def __init__(self, max_nodes: int) -> None:
        self._trees: defaultdict[str, RadixTree] = defaultdict(lambda: RadixTree(max_nodes))

    @property
    def available(self) -> bool:
        return True

    @property
    def num_dropped(self) -> int:
        return 0

    async def enroll(self, fingerprint: str, holder: Holder) -> int:
        # A slot is never used twice, so it tells one set of claims from the next.
        return self._trees[fingerprint].enroll(holder) or 0

    async def match(self, fingerprint: str, hashes: Sequence[PageHash]) -> dict[WorkerId, int]:
        return self._trees[fingerprint].match(hashes)

    async def insert(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash]) -> None:
        self._trees[fingerprint].insert(holder, hashes)

    async def remove(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash], keep: int) -> None:
        self._trees[fingerprint].remove(holder, hashes, keep)

    async def drop_worker(self, fingerprint: str, worker_id: WorkerId, generation: int) -> None:
        self._trees[fingerprint].drop(worker_id, generation)

    async def close(self) -> None:
        self._trees.clear()


def build(config: IndexConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> MemoryPrefixIndex:
    return MemoryPrefixIndex(config.max_nodes)
