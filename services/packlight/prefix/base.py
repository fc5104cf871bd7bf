"""The seam between the router, the prefill workers and the fleet-wide prefix index.

Knows what is asked of an index, not how it is kept. Sees page hashes (`core/hashing.py`), no tokens, text or tenants.

Who calls what: a prefill worker reports what it holds (`enroll`, `insert`, `remove`), the router asks (`match`) and
buries the dead (`drop_worker`). The index is a hint. A claim that is missing costs a prefix hit, a claim that is stale
costs a recomputation, neither can cost a wrong token: the worker alone decides what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from packlight.core.hashing import PageHash
from packlight.core.workers import WorkerId


@dataclass(frozen=True, slots=True)
class Holder:
    """One life of a worker. `generation` grows with every restart and is not negative.

    One index object speaks for a holder: two that report for the same one make each other start over."""

    worker_id: WorkerId
    generation: int


class PrefixIndex(Protocol):
    """Claims "this holder has the exact KV of these pages", per model fingerprint.

    `hashes` are always the chained hashes of a prompt from its first page on (a *path*). A holder that has a page has
    all pages before it. The first call with a newer generation kills the claims of the older ones; calls with an older
    generation than the newest known are ignored.

    No method raises because the backend is away, and none takes longer than the configured time-out: `match` finds
    nothing, writes are dropped and counted. `enroll` tells a holder when it must report everything again.
    """

    @property
    def available(self) -> bool:
        """False while the backend is away."""
        ...

    @property
    def num_dropped(self) -> int:
        """Calls that changed nothing because the backend was away."""
        ...

    async def enroll(self, fingerprint: str, holder: Holder) -> int:
        """Make the holder known. Returns the epoch of its claims: when that differs from the last one seen, earlier
        claims are gone (the backend was away, flushed or restarted, or a router dropped the worker), and the holder
        must insert all it holds again. To be called with every heartbeat. While the backend is away the epoch stays."""
        ...

    async def match(self, fingerprint: str, hashes: Sequence[PageHash]) -> dict[WorkerId, int]:
        """The number of leading pages each worker holds, workers with none left out."""
        ...

    async def insert(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash]) -> None:
        """The holder has all of this path."""
        ...

    async def remove(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash], keep: int) -> None:
        """The holder has lost page `hashes[keep]` and with it every path that goes through that page. It still has
        the first `keep` pages. Nothing happens when `keep >= len(hashes)`."""
        ...

    async def drop_worker(self, fingerprint: str, worker_id: WorkerId, generation: int) -> None:
        """The claims that this generation and older ones have made so far are gone. A worker that was only thought
        dead may claim again, and `enroll` tells it to."""
        ...

    async def close(self) -> None: ...
