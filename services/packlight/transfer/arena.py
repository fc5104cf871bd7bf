"""Memory that peers may write into, dealt out to shipments: which bytes are whose, and which must rest.

Knows offsets. Does not know the memory itself, nor who writes. A *slab* that is given back while its sender may still
write is quarantined: it is nobody's until that sender says that it is over, or nobody can write into the arena at all.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 4096
LEAST_SLAB = 1 << 20


@dataclass(frozen=True, slots=True)
class Slab:
    """Bytes `start` to `end` of the arena. Its number is never given again."""

    number: int
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class Arena:
    """free + held + quarantined = all, and no two slabs overlap."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes - num_bytes % ALIGNMENT
        self._held: dict[int, Slab] = {}
        self._quarantined: dict[int, tuple[Slab, float]] = {}  # and since when
        self._over: set[int] = set()  # of those held
        self._next_number = 1

    def take(self, num_bytes: int) -> Slab | None:
        """A slab of `num_bytes`; where that is more than half of the longest free run, of half of it, so that others
        find some too. None if so little is left that it is not worth while."""
        start, length = max(self._free_runs(), key=lambda run: run[1], default=(0, 0))
        wanted = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        granted = min(wanted, length // 2 // ALIGNMENT * ALIGNMENT)
        if granted < min(wanted, LEAST_SLAB):
            return None
        slab = Slab(self._next_number, start, start + granted)
        self._next_number += 1
        self._held[slab.number] = slab
        return slab

    def give_back(self, number: int, *, is_clean: bool, now_s: float) -> None:
        """`is_clean`: nobody writes into it any more."""
        slab = self._held.pop(number)
        if not is_clean and number not in self._over:
            self._quarantined[number] = (slab, now_s)
        self._over.discard(number)

    def clear(self, number: int) -> None:
        """Its sender will not write any more: it is free, now or when it is given back."""
        if self._quarantined.pop(number, None) is None and number in self._held:
            self._over.add(number)

    def clear_all(self) -> None:
        """Nobody to whom a slab was shown can write any more."""
        self._quarantined.clear()
        self._over.update(self._held)

    def num_lost_bytes(self, before_s: float) -> int:
        """Quarantined since before then: whoever should say that it is over is probably gone."""
        return sum(slab.num_bytes for slab, since_s in self._quarantined.values() if since_s < before_s)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def _free_runs(self) -> list[tuple[int, int]]:
        """(start, length) of what lies between slabs."""
        slabs = (*self._held.values(), *(slab for slab, _ in self._quarantined.values()))
        taken = sorted((slab.start, slab.end) for slab in slabs)
        starts = [0, *(end for _, end in taken)]
        ends = [*(start for start, _ in taken), self.num_bytes]
        return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end > start]
