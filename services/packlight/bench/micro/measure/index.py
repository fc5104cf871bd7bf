"""Prefix lookups and insertions, in trees of different sizes, beside a bare PING to the same server.

Knows the index seam. The tree is what a fleet's prompts make: everybody shares a system prompt, some share a document,
and each asks another question, so a path crosses three edges.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from packlight.bench.timing import Spread
from packlight.core.errors import StartupError
from packlight.core.hashing import HASH_BYTES, PageHash
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.redis_index import index_keys

NUM_HOLDERS = 4
Clock = Callable[[], float]
Subject = Callable[[int], Awaitable[float]]
"""The number of the call -> its seconds."""


@dataclass(frozen=True, slots=True)
class PathShape:
    """Pages of a prompt by who shares them. 32 + 256 + 149 pages of 16 tokens are a prompt of 7000."""

    num_system: int = 32
    num_document: int = 256
    num_question: int = 149
    questions_per_document: int = 4

    @property
    def num_pages(self) -> int:
        return self.num_system + self.num_document + self.num_question


@dataclass(slots=True)
class Calls:
    """Seconds of single calls, one list per round."""

    rounds: list[list[float]] = field(default_factory=list)

    def medians(self) -> Spread:
        """One value per round."""
        return Spread(tuple(sorted(calls)[len(calls) // 2] for calls in self.rounds))

    def all(self) -> list[float]:
        return [seconds for calls in self.rounds for seconds in calls]


class Tree:
    """An index that grows. Paths are made of hashes of their place, so any can be made again."""

    def __init__(
        self, index: PrefixIndex, shape: PathShape, fingerprint: str = "bench", clock: Clock = time.perf_counter
    ) -> None:
        self._index, self._shape, self._fingerprint, self._clock = index, shape, fingerprint, clock
        self._holders = [Holder(f"worker-{number}", 1) for number in range(NUM_HOLDERS)]
        self.num_paths = 0
        self.num_pages = 0

    async def grow(self, num_pages: int) -> None:
        """Insert paths until that many pages are indexed."""
        while self.num_pages < num_pages:
            await self.insert_next()

    async def insert_next(self) -> float:
        """Seconds of inserting one more path."""
        shape, number = self._shape, self.num_paths
        path = self.path(number)
        started = self._clock()
        await self._index.insert(self._fingerprint, self._holders[number % NUM_HOLDERS], path)
        seconds = self._clock() - started
        self.num_paths += 1
        self.num_pages += shape.num_question
        self.num_pages += shape.num_document * (number % shape.questions_per_document == 0)
        self.num_pages += shape.num_system * (number == 0)
        return seconds

    async def match(self, number: int) -> float:
        """Seconds of looking a path up that is there. Raises StartupError if it is not found whole."""
        path = self.path(number)
        started = self._clock()
        found = await self._index.match(self._fingerprint, path)
        seconds = self._clock() - started
        if found.get(self._holders[number % NUM_HOLDERS].worker_id) != len(path):
            raise StartupError(f"path {number} of {self.num_paths} is not in the index any more: {found}")
        return seconds

    def path(self, number: int) -> list[PageHash]:
        shape = self._shape
        document = number // shape.questions_per_document
        return [
            *_hashes("system", shape.num_system),
            *_hashes(f"document {document}", shape.num_document),
            *_hashes(f"question {number}", shape.num_question),
        ]


async def take_rounds(subjects: Mapping[str, Subject], num_rounds: int, num_calls: int) -> dict[str, Calls]:
    """Each subject is called `num_calls` times per round, with the number of the call, one call after the other; the
    subjects take turns within a round."""
    calls = {name: Calls([[] for _ in range(num_rounds)]) for name in subjects}
    for round_index in range(num_rounds):
        for call in range(num_calls):
            for name, subject in subjects.items():
                calls[name].rounds[round_index].append(await subject(round_index * num_calls + call))
    return calls


class Pinger:
    """A bare PING over one kept connection, with the client that the index uses, and nothing around it."""

    def __init__(self, url: str, clock: Clock = time.perf_counter) -> None:
        self._client = Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0), single_connection_client=True)
        self._clock = clock

    async def ping(self, call: int) -> float:
        started = self._clock()
        await self._client.execute_command("PING")
        return self._clock() - started

    async def forget(self, fingerprint: str) -> None:
        """Nothing is left on the server: it may be somebody else's."""
        await self._client.execute_command("UNLINK", *index_keys(fingerprint))

    async def close(self) -> None:
        await self._client.aclose()


def spread_numbers(num_paths: int, num: int) -> Iterator[int]:
    """`num` path numbers, from all over the tree."""
    step = max(1, int(num_paths * 0.618))
    return (index * step % num_paths for index in range(num))


def _hashes(what: str, num: int) -> Sequence[PageHash]:
    """One long digest, cut up: quick to make, and no two places share a hash."""
    data = hashlib.shake_128(what.encode()).digest(num * HASH_BYTES)
    return [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]
