"""The prefix index of a fleet: the radix tree of `radix.py`, kept in Redis or Valkey by the scripts beside this file.

Knows which keys and arguments the scripts take, and whether a holder's claims can still be trusted. Every call is one
round trip. All keys of a model share a hash tag, so a cluster keeps them on one node.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from packlight.core.config import IndexConfig
from packlight.core.hashing import PageHash
from packlight.core.workers import WorkerId
from packlight.prefix.base import Holder
from packlight.redis_link.link import RedisAway, RedisLink, redis_url
from packlight.redis_link.script import Script, load_script

UNUSED_TTL_S = 24 * 3600
"""A model's index disappears when no holder has enrolled for this long."""


@dataclass(slots=True)
class _Enrolment:
    """What one holder was last told. The lock keeps its writes in order: each must see the token of the one before."""

    token: bytes = b""
    epoch: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RedisPrefixIndex:
    """PrefixIndex in Redis. `max_nodes` bounds one model's tree."""

    def __init__(self, link: RedisLink, max_nodes: int) -> None:
        self._link = link
        self._max_nodes = max_nodes
        self._match, self._insert, self._remove, self._drop, self._enroll = (
            load_script("packlight.prefix", "radix", name) for name in ("match", "insert", "remove", "drop", "enroll")
        )
        self._enrolments: defaultdict[tuple[str, Holder], _Enrolment] = defaultdict(_Enrolment)
        self._num_dropped = 0

    @property
    def available(self) -> bool:
        return self._link.available

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    async def enroll(self, fingerprint: str, holder: Holder) -> int:
        return await self._write(self._enroll, fingerprint, holder, UNUSED_TTL_S)

    async def match(self, fingerprint: str, hashes: Sequence[PageHash]) -> dict[WorkerId, int]:
        if not hashes:
            return {}
        try:
            reply = await self._link.run(self._match, index_keys(fingerprint), [b"".join(hashes)])
        except RedisAway:
            return {}
        return {worker.decode(): num_pages for worker, num_pages in zip(reply[::2], reply[1::2], strict=True)}

    async def insert(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash]) -> None:
        await self._write(self._insert, fingerprint, holder, b"".join(hashes), self._max_nodes)

    async def remove(self, fingerprint: str, holder: Holder, hashes: Sequence[PageHash], keep: int) -> None:
        await self._write(self._remove, fingerprint, holder, b"".join(hashes), keep)

    async def drop_worker(self, fingerprint: str, worker_id: WorkerId, generation: int) -> None:
        try:
            await self._link.run(self._drop, index_keys(fingerprint), [worker_id, generation])
        except RedisAway:
            self._num_dropped += 1

    async def close(self) -> None:
        await self._link.close()

    async def _write(self, script: Script, fingerprint: str, holder: Holder, *args: bytes | int) -> int:
        """Run a script on the holder's behalf. Returns the epoch of its claims.

        A write that gets no reply may have happened, may not have, or may yet. So the token is forgotten before each
        write and only a reply brings it back. Without one the next write starts from no claims, which the changed
        token, and with it the epoch, tells the holder; and the server ignores a lost write that arrives after that.
        """
        enrolment = self._enrolments[fingerprint, holder]
        async with enrolment.lock:
            token, enrolment.token = enrolment.token, b""
            try:
                who = (holder.worker_id, holder.generation, token)
                reply: bytes | None = await self._link.run(script, index_keys(fingerprint), [*who, *args])
            except RedisAway:
                self._num_dropped += 1
                return enrolment.epoch
            if reply is not None:
                enrolment.token = reply
                enrolment.epoch += reply != token
            return enrolment.epoch


def index_keys(fingerprint: str) -> list[str]:
    """All that the index keeps of one model."""
    tag = quote(fingerprint, safe="")  # a brace would end the hash tag early
    return [f"packlight:prefix:{{{tag}}}:{part}" for part in ("meta", "edges", "claims", "lru")]


def build(config: IndexConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> RedisPrefixIndex:
    """Raises ConfigError if no server is named."""
    url = redis_url(
        config.redis_url, environ, "index.backend=redis", " or index.redis_url, or use index.backend=memory"
    )
    link = RedisLink(url, timeout_s=config.timeout_s, cooldown_s=config.breaker_s, clock=clock)
    return RedisPrefixIndex(link, config.max_nodes)
