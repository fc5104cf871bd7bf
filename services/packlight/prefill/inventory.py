"""Who is told what the radix cache of this worker holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from packlight.core.hashing import PageHash
from packlight.kv.radix import Eviction


class Inventory(Protocol):
    """`prefill/publisher.py` tells the fleet-wide index. Called on the event loop; must not block."""

    def stored(self, hashes: Sequence[PageHash]) -> None: ...
    def evicted(self, lost: Sequence[Eviction]) -> None: ...


class NoInventory:
    """Nobody is told."""

    def stored(self, hashes: Sequence[PageHash]) -> None:
        pass

    def evicted(self, lost: Sequence[Eviction]) -> None:
        pass
