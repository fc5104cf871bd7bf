"""Where a request goes. Pure: what is known of the workers in, a pair of workers out.

A prefill worker is judged by the predicted time to first token: the tokens that wait there, then the prompt's tokens
that it has not cached, at its measured speed, then the shipment at its measured bandwidth. A decode worker is judged by
how much of its packed pages and of its batch the request would find taken. Among near-ties the longest cached prefix
wins, so that a prefix does not spread over all caches; then the choice is random, so that routers that see the same
state do not all pick the same worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from packlight.core.errors import NoWorker
from packlight.core.types import Role, WorkerId, WorkerInfo

ASSUMED_TOKENS_PER_S = 1000.0  # of a prefill worker that has not measured itself yet
ASSUMED_BYTES_PER_S = 1e9
NEAR_TIE = 1.1  # costs within 10 % of the best ...
NEAR_TIE_S = 0.005  # ... or within 5 ms are equally good


@dataclass(frozen=True, slots=True)
class Demand:
    """What the request brings: `num_tokens` to prefill, `shipped_bytes` to ship and `num_pages` head pages to hold, at
    most."""

    num_tokens: int
    shipped_bytes: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: WorkerInfo
    decode: WorkerInfo
    num_cached_tokens: int
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the router knows beyond heartbeats: prefix matches in pages, and its own unanswered requests, which the
    workers' reports may not count yet."""

    matched_pages: Mapping[WorkerId, int]
    sent_tokens: Mapping[WorkerId, int]
    sent_requests: Mapping[WorkerId, int]


def place(
    workers: Sequence[WorkerInfo], demand: Demand, outlook: Outlook, *, avoid: frozenset[WorkerId], random: Random
) -> Pair:
    """The best compatible pair. Raises NoWorker saying what is missing."""
    usable = [worker for worker in workers if not worker.draining and worker.worker_id not in avoid]
    prefills = [worker for worker in usable if worker.role is Role.PREFILL]
    decodes = [worker for worker in usable if worker.role is Role.DECODE]
    hashes = {worker.compatibility for worker in decodes}
    paired = [worker for worker in prefills if worker.compatibility in hashes]
    if not paired:
        raise NoWorker(_what_is_missing(prefills, decodes), retry_after_s=1.0)
    near = _near_ties({worker: predict_ttft_s(worker, demand, outlook) for worker in paired})
    longest = max(cached_tokens(worker, demand, outlook) for worker in near)
    prefill = random.choice([worker for worker in near if cached_tokens(worker, demand, outlook) == longest])
    partners = [worker for worker in decodes if worker.compatibility == prefill.compatibility]
    decode = random.choice(_near_ties({worker: decode_cost(worker, demand, outlook) for worker in partners}))
    return Pair(prefill, decode, cached_tokens(prefill, demand, outlook), predict_ttft_s(prefill, demand, outlook))


def predict_ttft_s(worker: WorkerInfo, demand: Demand, outlook: Outlook) -> float:
    """Queue wait + prefill of what is not cached + shipping, in seconds."""
    load = worker.load
    waiting = max(load.num_queued_tokens, outlook.sent_tokens.get(worker.worker_id, 0))
    uncached = demand.num_tokens - cached_tokens(worker, demand, outlook)
    speed = load.tokens_per_s or ASSUMED_TOKENS_PER_S
    return (waiting + uncached) / speed + demand.shipped_bytes / (load.ship_bytes_per_s or ASSUMED_BYTES_PER_S)


def cached_tokens(worker: WorkerInfo, demand: Demand, outlook: Outlook) -> int:
    matched = outlook.matched_pages.get(worker.worker_id, 0) * worker.page_size
    return min(matched, demand.num_tokens)


def decode_cost(worker: WorkerInfo, demand: Demand, outlook: Outlook) -> float:
    """Requests ahead of this one, and many more if its pages would have to wait: a unit is one running request."""
    load = worker.load
    ahead = max(load.num_running + load.num_queued, outlook.sent_requests.get(worker.worker_id, 0))
    free = load.num_free_pages
    must_wait = 100.0 if demand.num_pages > free else 0.0
    return ahead + must_wait + (1.0 - free / max(1, load.num_total_pages))


def _near_ties(costs: dict[WorkerInfo, float]) -> list[WorkerInfo]:
    best = min(costs.values())
    return [worker for worker, cost in costs.items() if cost <= max(best * NEAR_TIE, best + NEAR_TIE_S)]


def _what_is_missing(prefills: Sequence[WorkerInfo], decodes: Sequence[WorkerInfo]) -> str:
    if prefills and decodes:
        return f"none of {len(prefills)} prefill and {len(decodes)} decode workers run compatible releases"
    missing = [role for role, workers in ((Role.PREFILL, prefills), (Role.DECODE, decodes)) if not workers]
    return f"no live {' and no live '.join(missing)} worker: is one running, with the same REDIS_URL?"
