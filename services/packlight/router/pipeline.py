"""The life of one answer, from the router's side: match, place, generate, and try again elsewhere if it is worth it.

Knows the index, the view of the fleet and the decode clients. Does not know HTTP or text. All retrying is done here, by
the rules of `attempts.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from random import Random

from packlight.compress.budget import max_pages
from packlight.compress.policy import Decision, Plan, uses_cache
from packlight.core.config import RouterConfig
from packlight.core.errors import NoWorker, PacklightError, WorkerLost
from packlight.core.hashing import page_hashes
from packlight.core.types import (
    Failed,
    GenerateEvent,
    GenerateRequest,
    ModelSpec,
    is_terminal,
)
from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.fleet.view import FleetView
from packlight.prefix.base import PrefixIndex
from packlight.router.attempts import Attempts
from packlight.router.clients import DecodeClients
from packlight.router.placement import Demand, Outlook, Pair, place
from packlight.router.readiness import serves, why_not_ready
from packlight.router.sent import Sent
from packlight.router.service import BackendEvent, Decided, Readiness
from packlight.router.spans import end_attempt, tell_attempt, tell_route
from packlight.router.strangers import Strangers
from packlight.telemetry.logs import log_event
from packlight.telemetry.metrics import RouterMetrics
from packlight.telemetry.traces import NO_TRACER, Kind, Tracer, ending, span_error, traced

log = logging.getLogger(__name__)


class Pipeline:
    """The router's `Backend`."""

    def __init__(
        self,
        config: RouterConfig,
        spec: ModelSpec,
        index: PrefixIndex,
        view: FleetView,
        clients: DecodeClients,
        metrics: RouterMetrics,
        *,
        random: Random | None = None,
        tracer: Tracer = NO_TRACER,
        clock: Callable[[], float] = time.monotonic,
        speaks_tls: bool = False,
    ) -> None:
        """`speaks_tls` is how `clients` call workers: those that are called otherwise are passed over."""
        self._config, self._spec, self._index, self._view = config, spec, index, view
        self._clients, self._metrics, self._random, self._clock = clients, metrics, random or Random(), clock
        self._tracer, self._sent = tracer, Sent()
        self._speaks_tls, self._strangers = speaks_tls, Strangers(speaks_tls=speaks_tls)

    def readiness(self) -> Readiness:
        """Ready when a compatible pair of workers is alive, or a decode worker that prefills itself."""
        listed = self.workers()
        why_not = why_not_ready(listed, self._spec, speaks_tls=self._speaks_tls)
        workers = [worker for worker in listed if self._serves(worker) and not worker.draining]
        counts = {role.value: sum(worker.role is role for worker in workers) for role in Role}
        for role, num in counts.items():
            self._metrics.set_workers(role, num)
        self._metrics.set_index_available(self._index.available)
        details = {
            "workers": counts,
            "prefix_index": "available" if self._index.available else "away: placing by load alone",
            "fleet_registry": "available" if self._view.available else "away: using the last known workers",
        }
        strangers = self._strangers.tell(listed)
        return Readiness(
            why_not is None,
            details | ({"strangers": strangers} if strangers else {}) | ({"why_not": why_not} if why_not else {}),
        )

    def workers(self) -> tuple[WorkerInfo, ...]:
        """As the registry lists them, those of another model included. Asked role by role: suspects are passed over
        only if somebody of their own role is left."""
        return self._view.workers(Role.PREFILL) + self._view.workers(Role.DECODE)

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[BackendEvent, None]:
        """The events of one answer, whatever number of workers it takes. Raises NoWorker if there is none for the first
        attempt."""
        attempts, started = Attempts(request, plan or Plan(Decision(request.pack))), self._clock()
        while attempts.num_made < self._config.max_attempts:
            pair = await self._next_pair(attempts)
            if pair is None:
                break
            decision = attempts.decide(pair)
            if attempts.error is None:
                yield Decided(request.request_id, decision)
            else:
                self._metrics.count_retry(type(attempts.error).__name__)
            now = attempts.begin(pair, self._clock() - started)
            async with aclosing(self._attempt(now, pair)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        self._note_failure(attempts, now, event.error, pair)
                        break
                    yield attempts.see(event)
                else:
                    return
            if not attempts.is_worth_another:
                break
        yield attempts.end()

    async def _next_pair(self, attempts: Attempts) -> Pair | None:
        """None if nobody is left to try: the error of the last one tried says more than that."""
        try:
            return await self._place(attempts.resumed(), attempts.plan, attempts.avoid)
        except NoWorker:
            if attempts.error is None:
                raise
            return None

    def _note_failure(self, attempts: Attempts, sent: GenerateRequest, error: PacklightError, pair: Pair) -> None:
        log_event(
            log,
            logging.WARNING,
            "attempt failed",
            trace=sent.trace,
            answer=sent.request_id,
            worker=error.worker_id,
            error=type(error).__name__,
            reason=error.message,
        )
        attempts.fail(error, self._blame(error, pair))

    # ── one attempt ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _place(self, request: GenerateRequest, plan: Plan, avoid: frozenset[WorkerId]) -> Pair:
        started = self._clock()
        with ending(self._tracer.start("route", request.trace)) as span:
            workers = self._usable()
            matched = await self._match(request, workers) if plan.looks_at_cache(request.num_prompt_tokens) else {}
            span.moment("matched")
            outlook = Outlook(matched, self._sent.tokens, self._sent.requests)
            pair = self._choose(workers, self._demand(request, workers), outlook, avoid)
            tell_route(span, request, pair)
        self._metrics.observe_route(self._clock() - started)
        self._metrics.count_placement(pair.where, pair.reason)
        return pair

    def _choose(
        self, workers: tuple[WorkerInfo, ...], demand: Demand, outlook: Outlook, avoid: frozenset[WorkerId]
    ) -> Pair:
        """Suspects are tried when nobody else can serve the request."""
        trusted = [worker for worker in workers if not self._view.is_suspect(worker)]
        try:
            return place(trusted, demand, outlook, avoid=avoid, random=self._random)
        except NoWorker:
            return place(workers, demand, outlook, avoid=avoid, random=self._random)

    def _usable(self) -> tuple[WorkerInfo, ...]:
        listed = self.workers()
        usable = tuple(worker for worker in listed if self._serves(worker))
        if len(usable) < len(listed):
            self._strangers.tell(listed)
        return usable

    def _serves(self, worker: WorkerInfo) -> bool:
        return serves(worker, self._spec, speaks_tls=self._speaks_tls)

    async def _match(self, request: GenerateRequest, workers: tuple[WorkerInfo, ...]) -> dict[WorkerId, int]:
        """Pages of the prompt that each worker holds. One look-up per kind of model in the fleet: one."""
        prefilling = [worker for worker in workers if worker.role is Role.PREFILL or worker.local_prefill]
        kinds = {(worker.fingerprint, worker.page_size) for worker in prefilling}
        matched: dict[WorkerId, int] = {}
        for fingerprint, page_size in sorted(kinds):
            hashes = page_hashes(request.token_ids, page_size, fingerprint=fingerprint, salt=request.cache_salt)
            if hashes:
                matched |= await self._index.match(fingerprint, hashes)
        return matched

    def _demand(self, request: GenerateRequest, workers: tuple[WorkerInfo, ...]) -> Demand:
        page_size = workers[0].page_size if workers else 16
        num_pages = max_pages(
            request.pack, self._spec, request.num_prompt_tokens, page_size, num_new_tokens=request.stop.max_tokens
        )
        num_heads = self._spec.num_layers * self._spec.num_kv_heads
        prompt_pages = num_pages - num_heads * (request.stop.max_tokens // page_size)
        itemsize = 4 if self._spec.dtype == "float32" else 2
        return Demand(
            num_tokens=len(request.token_ids),
            shipped_bytes=2 * prompt_pages * page_size * self._spec.head_dim * itemsize,
            num_pages=num_pages,
        )

    async def _attempt(self, request: GenerateRequest, pair: Pair) -> AsyncGenerator[GenerateEvent, None]:
        """One try at one pair; what the client raises becomes a `Failed`."""
        num_cached = pair.num_cached_tokens if uses_cache(request.pack, request.num_prompt_tokens) else 0
        prefilling = self._sent.prefilling(pair.prefill.worker_id, len(request.token_ids) - num_cached)
        started, has_begun = self._clock(), False
        attempt = ending(self._tracer.start("attempt", request.trace, kind=Kind.CLIENT))
        with prefilling as prefilled, self._sent.decoding(pair.decode.worker_id), attempt as span:
            tell_attempt(span, request, pair)
            try:
                async with aclosing(self._clients.get(pair.decode).generate(traced(request, span))) as events:
                    async for event in events:
                        if not has_begun:
                            has_begun = True
                            prefilled()
                            if not isinstance(event, Failed):
                                self._metrics.observe_prediction(pair.where, pair.ttft_s, self._clock() - started)
                        if is_terminal(event):
                            end_attempt(span, event)
                        yield event
            except PacklightError as error:
                error.worker_id = error.worker_id or pair.decode.worker_id
                span.end(span_error(error))
                yield Failed(request.request_id, error)

    def _blame(self, error: PacklightError, pair: Pair) -> WorkerId:
        """The worker a retry must avoid; one that cannot be reached is suspect to everybody."""
        culprit = pair.prefill if error.worker_id == pair.prefill.worker_id else pair.decode
        if isinstance(error, WorkerLost):
            self._view.suspect(culprit.worker_id, culprit.generation)
        return culprit.worker_id
