"""The registry of a fleet in Redis or Valkey, by the scripts beside this file. Every call is one round trip."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from packlight.core.config import FleetConfig
from packlight.core.workers import WorkerId, WorkerInfo
from packlight.fleet.base import FleetAway, Sighting
from packlight.fleet.card import decode_worker, encode_worker
from packlight.redis_link.link import RedisAway, RedisLink, redis_url
from packlight.redis_link.script import load_script

log = logging.getLogger(__name__)

KEYS = tuple(f"packlight:{{fleet}}:{part}" for part in ("cards", "heard", "born"))
TIMEOUT_S = 0.5
"""Nobody's request waits for the registry, so it gets more time than the prefix index."""
UNUSED_TTL_S = 3600
"""A registry disappears when nobody has sent a heartbeat for this long."""


class RedisFleet:
    """Fleet in Redis. `clock` is monotonic, in seconds; heartbeats are timed by the server's clock, not by this one.

    A registry that was away or lost its memory (restart, FLUSHALL) knows nobody until the next heartbeats. So the
    workers it listed before count as alive until it has been there for `ttl_s`.
    """

    def __init__(self, link: RedisLink, ttl_s: float, clock: Callable[[], float]) -> None:
        self._link = link
        self._ttl_s = ttl_s
        self._clock = clock
        self._heartbeat, self._leave, self._list = (
            load_script("packlight.fleet", "fleet", name) for name in ("heartbeat", "leave", "list")
        )
        self._heard: dict[WorkerId, tuple[WorkerInfo, float]] = {}  # as last listed: state, time of the heartbeat
        self._registry: tuple[bytes | None, int] | None = None  # which registry that was
        self._complete_at = 0.0

    @property
    def available(self) -> bool:
        return self._link.available

    async def heartbeat(self, info: WorkerInfo) -> None:
        times = (_ms(self._ttl_s), _ms(UNUSED_TTL_S))
        try:
            await self._link.run(self._heartbeat, KEYS, [info.worker_id, info.generation, encode_worker(info), *times])
        except RedisAway as reason:
            log.debug("heartbeat of %s lost: %s", info.worker_id, reason)

    async def leave(self, worker_id: WorkerId, generation: int) -> None:
        try:
            await self._link.run(self._leave, KEYS, [worker_id, generation])
        except RedisAway as reason:
            log.debug("leave of %s lost: %s", worker_id, reason)

    async def list(self) -> tuple[Sighting, ...]:
        try:
            born, entries = await self._link.run(self._list, KEYS, [_ms(self._ttl_s)])
        except RedisAway as reason:
            raise FleetAway(f"the fleet registry in Redis is away: {reason}") from reason
        self._adopt((born, self._link.num_heals), entries)
        now = self._clock()
        return tuple(Sighting(worker, now - heard_at) for _, (worker, heard_at) in sorted(self._heard.items()))

    async def close(self) -> None:
        await self._link.close()

    def _adopt(self, registry: tuple[bytes | None, int], entries: Sequence[bytes | int]) -> None:
        """Take over a listing (card, age in ms, ...), on top of the last one if that came from another registry."""
        now = self._clock()
        if registry != self._registry:
            self._complete_at = now + self._ttl_s if self._heard else now
            self._registry = registry
        before = self._heard if now < self._complete_at else {}
        cards = zip(entries[::2], entries[1::2], strict=True)
        heard = [(worker, now - int(age_ms) / 1000) for card, age_ms in cards if (worker := decode_worker(bytes(card)))]
        self._heard = before | {worker.worker_id: (worker, heard_at) for worker, heard_at in heard}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def build(config: FleetConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> RedisFleet:
    """Raises ConfigError if no server is named."""
    url = redis_url(None, environ, "fleet.backend=redis", ", or use fleet.backend=memory")
    link = RedisLink(url, timeout_s=TIMEOUT_S, cooldown_s=config.heartbeat_s / 2, clock=clock)
    return RedisFleet(link, config.ttl_s, clock)
