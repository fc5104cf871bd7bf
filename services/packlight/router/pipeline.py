"""The life of one answer, from the router's side: match, place, generate, and try again elsewhere if it is worth it.

Knows the index, the view of the fleet and the decode clients. Does not know HTTP or text. All retries are here:

- before the first token a failed attempt is simply made again, with the workers at fault left out;
- after it, the answer is resumed: prompt + tokens so far go to another worker, selection anchored at the prompt's end.
  Noise depends on (seed, position) only, so at recipe `none` the tokens are those of an unbroken run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from random import Random

from packlight.compress.budget import max_pages
from packlight.compress.policy import Decision, Plan, uses_cache
from packlight.core.config import RouterConfig
from packlight.core.errors import NoWorker, PacklightError, WorkerLost
from packlight.core.hashing import page_hashes
from packlight.core.types import (
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    ModelSpec,
    PackSpec,
    Progress,
    Role,
    Tokens,
    Usage,
    WorkerId,
    WorkerInfo,
    is_terminal,
)
from packlight.fleet.view import FleetView
from packlight.prefix.base import PrefixIndex
from packlight.router.clients import DecodeClients
from packlight.router.placement import Demand, Outlook, Pair, place
from packlight.router.readiness import serves, why_not_ready
from packlight.router.service import BackendEvent, Decided, Readiness
from packlight.router.spans import end_attempt, tell_attempt, tell_route
from packlight.telemetry.logs import log_event
from packlight.telemetry.metrics import RouterMetrics
from packlight.telemetry.traces import NO_TRACER, Kind, Tracer, ending, span_error, traced

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sent:
    """What this router has sent and not seen answered, by worker. Heartbeats are a second old; this is not."""

    tokens: Counter[WorkerId] = field(default_factory=Counter)
    requests: Counter[WorkerId] = field(default_factory=Counter)

    @contextmanager
    def prefilling(self, worker_id: WorkerId, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts `num_tokens` until the block ends or the yielded function is called."""
        open_tokens = [num_tokens]

        def done() -> None:
            self.tokens[worker_id] -= open_tokens.pop() if open_tokens else 0

        self.tokens[worker_id] += num_tokens
        try:
            yield done
        finally:
            done()

    @contextmanager
    def decoding(self, worker_id: WorkerId) -> Iterator[None]:
        self.requests[worker_id] += 1
        try:
            yield
        finally:
            self.requests[worker_id] -= 1


@dataclass(slots=True)
class SoFar:
    """What the client has of an answer, over all attempts."""

    token_ids: list[int] = field(default_factory=list)
    usage: Usage | None = None

    def add(self, event: GenerateEvent) -> GenerateEvent:
        """Take note of `event`. Returns it as the client shall see it: cached is what the first try found cached."""
        if isinstance(event, Tokens):
            self.token_ids += [token.token_id for token in event.tokens]
        elif isinstance(event, Progress | Finished):
            num_cached = self.usage.num_cached_tokens if self.usage else event.usage.num_cached_tokens
            self.usage = replace(event.usage, num_cached_tokens=num_cached)
            return replace(event, usage=self.usage)
        return event

    def finished(self, request: GenerateRequest) -> Finished | None:
        """The end that was lost with a worker which had already sent the last token."""
        reason = request.stop.ends(self.token_ids[-1], len(self.token_ids)) if self.token_ids else None
        if reason is None or self.usage is None:
            return None
        usage = replace(self.usage, num_generated_tokens=len(self.token_ids))
        return Finished(request.request_id, reason, usage)


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
    ) -> None:
        self._config, self._spec, self._index, self._view = config, spec, index, view
        self._clients, self._metrics, self._random, self._clock = clients, metrics, random or Random(), clock
        self._tracer, self._sent = tracer, Sent()

    def readiness(self) -> Readiness:
        """Ready when a compatible pair of workers is alive, or a decode worker that prefills itself."""
        listed = self._view.workers(Role.PREFILL) + self._view.workers(Role.DECODE)
        why_not = why_not_ready(listed, self._spec)
        workers = [worker for worker in listed if serves(worker, self._spec) and not worker.draining]
        counts = {role.value: sum(worker.role is role for worker in workers) for role in Role}
        for role, num in counts.items():
            self._metrics.set_workers(role, num)
        self._metrics.set_index_available(self._index.available)
        details = {
            "workers": counts,
            "prefix_index": "available" if self._index.available else "away: placing by load alone",
            "fleet_registry": "available" if self._view.available else "away: using the last known workers",
        }
        return Readiness(why_not is None, details | ({"why_not": why_not} if why_not else {}))

    def workers(self) -> tuple[WorkerInfo, ...]:
        """As the registry lists them, those of another model included."""
        return self._view.workers(Role.PREFILL) + self._view.workers(Role.DECODE)

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[BackendEvent, None]:
        """The events of one answer, whatever number of workers it takes. When no worker is left to try, the error of
        the last one tried says more than that."""
        started, avoid, so_far = self._clock(), frozenset[WorkerId](), SoFar()
        plan = plan or Plan(Decision(request.pack))
        error: PacklightError | None = None
        for attempt in range(self._config.max_attempts):
            now = _resumed(request, so_far)
            try:
                pair = await self._place(now, plan, avoid)
            except NoWorker:
                if error is None:
                    raise
                break
            decision = plan.decide(pair.num_cached_tokens)
            if error is None:
                yield Decided(request.request_id, decision)
            else:
                self._metrics.count_retry(type(error).__name__)
            # Whoever takes over selects as the first one did, whatever it has cached.
            plan = Plan(decision)
            request = _packed(request, decision.pack)
            now = _addressed(now, pair, decision.pack, attempt, self._clock() - started)
            async with aclosing(self._attempt(now, pair)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        error = event.error
                        break
                    yield replace(so_far.add(event), request_id=request.request_id)
                else:
                    return
            log_event(
                log,
                logging.WARNING,
                "attempt failed",
                trace=now.trace,
                answer=now.request_id,
                worker=error.worker_id,
                error=type(error).__name__,
                reason=error.message,
            )
            avoid |= {self._blame(error, pair)}
            if not error.retryable or so_far.finished(request):
                break
        assert error is not None
        yield so_far.finished(request) or Failed(request.request_id, error)

    # ── one attempt ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _place(self, request: GenerateRequest, plan: Plan, avoid: frozenset[WorkerId]) -> Pair:
        started = self._clock()
        with ending(self._tracer.start("route", request.trace)) as span:
            workers = self._workers()
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

    def _workers(self) -> tuple[WorkerInfo, ...]:
        """Asked role by role: suspects are passed over only if somebody of their own role is left."""
        listed = self._view.workers(Role.PREFILL) + self._view.workers(Role.DECODE)
        return tuple(worker for worker in listed if serves(worker, self._spec))

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


def _resumed(request: GenerateRequest, so_far: SoFar) -> GenerateRequest:
    return replace(request, token_ids=(*request.token_ids, *so_far.token_ids)) if so_far.token_ids else request


def _packed(request: GenerateRequest, pack: PackSpec) -> GenerateRequest:
    return request if request.pack is pack else replace(request, pack=pack)


def _addressed(request: GenerateRequest, pair: Pair, pack: PackSpec, attempt: int, spent_s: float) -> GenerateRequest:
    """What this attempt sends, after `spent_s` seconds."""
    return replace(
        request,
        request_id=f"{request.request_id}.{attempt}",
        pack=pack,
        prefill_id=pair.prefill.worker_id,
        prefill_address=pair.prefill.address,
        deadline_s=max(0.001, request.deadline_s - spent_s),
    )
