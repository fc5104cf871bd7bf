"""Where a request goes. Pure: what is known of the workers in, a pair of workers out.

A request needs somebody who prefills its prompt and somebody who decodes its answer. Who prefills is a prefill worker
(*remote*), or the decode worker itself (*local*): then nothing is shipped, but its running answers wait meanwhile. The
ways there are to do it are compared by one cost in seconds:

    cost = predicted time to first token + answers that wait for it x seconds they wait

A second is a second, whoever waits. Among near-ties the longest cached prefix wins, so that a prefix does not spread
over all caches; then the pair that ships nothing; then the decode worker with most room; then chance, so that routers
that see the same state do not all pick the same workers. Where links are known to differ, a slower one counts like more
requests on the decode worker behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil
from operator import itemgetter
from random import Random
from typing import TypeVar

from packlight.core.errors import NoWorker
from packlight.core.workers import LocalPrefill, Role, WorkerId, WorkerInfo
from packlight.router.beliefs import as_believed, prefilling

ASSUMED_TOKENS_PER_S = 1000.0  # of a worker that has not measured itself, unless others of the fleet are known faster
ASSUMED_BYTES_PER_S = 1e9
ASSUMED_ARRIVALS_PER_S = 0.5  # requests that begin to decode on a worker while it prefills
MOST_WEIGHED = 16  # of equally good prefill workers, pair by pair with all decode workers
REQUEST_S = 0.05  # one more request on a decode worker is as bad as waiting this much longer for the KV
HOP_S = 0.005  # a call from decode to prefill, until its first event is back
NEAR_TIE = 1.1  # costs within 10 % of the best ...
NEAR_TIE_S = 0.005  # ... or within 5 ms are equally good

T = TypeVar("T")


class Reason(StrEnum):
    """Why a prompt is prefilled where it is."""

    CHEAPER = "cheaper"  # by the cost above, and there was a choice
    ONLY = "only_way"  # nobody does it the other way: no prefill worker, or no decode worker that prefills
    TOO_LONG = "too_long"  # decode workers prefill, but have no room for a prompt of this length


@dataclass(frozen=True, slots=True)
class Demand:
    """What the request brings: `num_tokens` to prefill, `shipped_bytes` to ship and `num_pages` head pages to hold, at
    most."""

    num_tokens: int
    shipped_bytes: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Pair:
    """`prefill` of a local pair is the decode worker by the name and with the load of its `local_prefill`. `ttft_s` is
    the prediction."""

    prefill: WorkerInfo
    decode: WorkerInfo
    is_local: bool
    num_cached_tokens: int
    ttft_s: float
    reason: Reason

    @property
    def where(self) -> str:
        return "local" if self.is_local else "remote"


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the router knows beyond heartbeats: prefix matches in pages, and its own unanswered requests, which the
    workers' reports may not count yet."""

    matched_pages: Mapping[WorkerId, int]
    sent_tokens: Mapping[WorkerId, int]
    sent_requests: Mapping[WorkerId, int]


@dataclass(frozen=True, slots=True)
class Option:
    """Somebody who can prefill, and the decode workers it can do it for: a local one for `decodes[0]` only."""

    prefill: WorkerInfo
    decodes: Sequence[WorkerInfo]
    local: LocalPrefill | None = None


def place(
    workers: Sequence[WorkerInfo], demand: Demand, outlook: Outlook, *, avoid: frozenset[WorkerId], random: Random
) -> Pair:
    """The best compatible pair. Raises NoWorker saying what is missing."""
    usable = [worker for worker in workers if not worker.draining and worker.worker_id not in avoid]
    usable = as_believed(usable, demand.num_tokens)
    options = _options(usable, demand, avoid)
    if not options:
        raise NoWorker(_what_is_missing(usable, demand), retry_after_s=1.0)
    costs = Costs(demand, outlook, _best_speed(usable))
    best = _near_ties([option for option in options if _has_room(option, demand)] or options, costs.of)
    longest = max(cached_tokens(option.prefill, demand, outlook) for option in best)
    best = [option for option in best if cached_tokens(option.prefill, demand, outlook) == longest]
    best = [option for option in best if option.local] or best
    some = random.sample(best, min(len(best), MOST_WEIGHED))
    option, decode = random.choice(_best_pairs(some, costs))
    is_local, ttft_s = option.local is not None, costs.ttft_s(replace(option, decodes=[decode]))
    return Pair(option.prefill, decode, is_local, longest, ttft_s, _reason(is_local, options, usable))


# ── the cost of an option ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one request. `assumed_tokens_per_s` is the speed of those who have not measured theirs."""

    demand: Demand
    outlook: Outlook
    assumed_tokens_per_s: float = ASSUMED_TOKENS_PER_S

    def of(self, option: Option) -> float:
        """Seconds that somebody waits."""
        return self.ttft_s(option) + self.stall_s(option)

    def ttft_s(self, option: Option) -> float:
        """The wait in the queue, the prefill of what is not cached, and what lies between the two workers: for a remote
        one the call and the shipment, for a local one the decode steps that take turns with its chunks."""
        load = option.prefill.load
        waiting = max(load.num_queued_tokens, self.outlook.sent_tokens.get(option.prefill.worker_id, 0))
        computing_s = waiting / self._tokens_per_s(option) + self.prefill_s(option)
        if option.local is None:
            return computing_s + HOP_S + min(self.ship_s(option))
        (decode,) = option.decodes
        num_turns = ceil(computing_s / option.local.max_stall_s) if requests_ahead(decode, self.outlook) else 0
        return computing_s + num_turns * decode.load.step_s

    def ship_s(self, option: Option) -> list[float]:
        """Of the KV, to each of `decodes`: over the pair's link, or while that has not been measured over one like the
        worker's others."""
        if option.local is not None:
            return [0.0]
        worker_id, unmeasured = option.prefill.worker_id, option.prefill.load.ship_bytes_per_s or ASSUMED_BYTES_PER_S
        num_bytes = self.demand.shipped_bytes
        return [num_bytes / decode.load.link_bytes_per_s.get(worker_id, unmeasured) for decode in option.decodes]

    def stall_s(self, option: Option) -> float:
        """Seconds that answers wait for a local prefill: those on the worker, and half of those that begin meanwhile,
        as they come one by one. So it grows with the square of a prompt's length, and long prompts go elsewhere."""
        if option.local is None:
            return 0.0
        seconds = self.prefill_s(option)
        return seconds * (requests_ahead(option.decodes[0], self.outlook) + ASSUMED_ARRIVALS_PER_S * seconds / 2)

    def prefill_s(self, option: Option) -> float:
        """Of this prompt alone, once it is its turn."""
        uncached = self.demand.num_tokens - cached_tokens(option.prefill, self.demand, self.outlook)
        return option.prefill.load.fixed_s + uncached / self._tokens_per_s(option)

    def _tokens_per_s(self, option: Option) -> float:
        return option.prefill.load.tokens_per_s or self.assumed_tokens_per_s


def cached_tokens(prefill: WorkerInfo, demand: Demand, outlook: Outlook) -> int:
    matched = outlook.matched_pages.get(prefill.worker_id, 0) * prefill.page_size
    return min(matched, demand.num_tokens)


def requests_ahead(decode: WorkerInfo, outlook: Outlook) -> int:
    """Requests on the worker, as far as is known."""
    return max(decode.load.num_running + decode.load.num_queued, outlook.sent_requests.get(decode.worker_id, 0))


def decode_cost(decode: WorkerInfo, demand: Demand, outlook: Outlook) -> float:
    """Requests ahead of this one, and many more if its pages would have to wait: a unit is one running request."""
    free = decode.load.num_free_pages
    must_wait = 100.0 if demand.num_pages > free else 0.0
    return requests_ahead(decode, outlook) + must_wait + (1.0 - free / max(1, decode.load.num_total_pages))


def _best_pairs(options: Sequence[Option], costs: Costs) -> list[tuple[Option, WorkerInfo]]:
    """Near-ties by what the decode worker costs, and how much longer than over the fastest link shipping takes."""
    decodes = {decode.worker_id: decode for option in options for decode in option.decodes}
    loads = {worker_id: decode_cost(decode, costs.demand, costs.outlook) for worker_id, decode in decodes.items()}
    ship_s = [costs.ship_s(option) for option in options]
    fastest_s = min(min(seconds) for seconds in ship_s)
    weighed = [
        (loads[decode.worker_id] + (seconds - fastest_s) / REQUEST_S, option, decode)
        for option, of_option in zip(options, ship_s, strict=True)
        for decode, seconds in zip(option.decodes, of_option, strict=True)
    ]
    return [(option, decode) for _, option, decode in _near_ties(weighed, itemgetter(0))]


# ── which options there are ──────────────────────────────────────────────────────────────────────────────────────────


def _options(usable: Sequence[WorkerInfo], demand: Demand, avoid: frozenset[WorkerId]) -> list[Option]:
    decodes: dict[str, list[WorkerInfo]] = {}
    for worker in usable:
        if worker.role is Role.DECODE:
            decodes.setdefault(worker.compatibility, []).append(worker)
    found = [
        Option(worker, decodes[worker.compatibility])
        for worker in usable
        if worker.role is Role.PREFILL and worker.compatibility in decodes
    ]
    for worker in usable:
        local = worker.local_prefill
        if local is not None and local.worker_id not in avoid and demand.num_tokens <= local.max_tokens:
            found.append(Option(_local_of(worker, local), [worker], local))
    return found


def _local_of(decode: WorkerInfo, local: LocalPrefill) -> WorkerInfo:
    """As a prefill worker. It has no address: nobody but the decode worker itself can reach it."""
    return replace(
        decode, worker_id=local.worker_id, role=Role.PREFILL, address="", load=local.load, local_prefill=None
    )


def _best_speed(workers: Sequence[WorkerInfo]) -> float:
    """Who has not measured is believed to be as good as any: otherwise nobody would ever find out."""
    speeds = [prefilling(worker).tokens_per_s for worker in workers]
    return max([ASSUMED_TOKENS_PER_S, *speeds])


def _has_room(option: Option, demand: Demand) -> bool:
    return any(demand.num_pages <= decode.load.num_free_pages for decode in option.decodes)


def _near_ties(choices: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    costs = [cost(choice) for choice in choices]
    most = max(min(costs) * NEAR_TIE, min(costs) + NEAR_TIE_S)
    return [choice for choice, cost in zip(choices, costs, strict=True) if cost <= most]


def _reason(is_local: bool, options: Sequence[Option], usable: Sequence[WorkerInfo]) -> Reason:
    if any((option.local is not None) != is_local for option in options):
        return Reason.CHEAPER
    return Reason.TOO_LONG if not is_local and any(worker.local_prefill for worker in usable) else Reason.ONLY


def _what_is_missing(usable: Sequence[WorkerInfo], demand: Demand) -> str:
    prefills = [worker for worker in usable if worker.role is Role.PREFILL]
    decodes = [worker for worker in usable if worker.role is Role.DECODE]
    if prefills and decodes:
        return f"none of {len(prefills)} prefill and {len(decodes)} decode workers run compatible releases"
    most = max((worker.local_prefill.max_tokens for worker in decodes if worker.local_prefill), default=0)
    if 0 < most < demand.num_tokens:
        return (
            f"no live prefill worker, and decode workers prefill up to {most} tokens themselves; the prompt has "
            f"{demand.num_tokens}: start a prefill worker, or raise decode.local_prefill.kv_memory_bytes"
        )
    missing = [role for role, workers in ((Role.PREFILL, prefills), (Role.DECODE, decodes)) if not workers]
    return f"no live {' and no live '.join(missing)} worker: is one running, with the same REDIS_URL?"
