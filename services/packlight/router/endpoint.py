"""One POST that makes answers: the life of an HTTP request, from its first byte to its one outcome.

An ASGI application of its own and not a route function, because it must own both directions: `receive`, to notice that
the client left, and `send`, to decide late whether the answer is an error, a body or a stream.

    enter the gate ─▶ read the body ─▶ Job (on a thread) ─▶ Generation ─▶ stream or body
         429/503          413/415          400/404          4xx/5xx until the first event, then an SSE error

Nothing is sent before the backend's first event. A client that leaves cancels everything from there on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from packlight.core.config import RouterConfig
from packlight.core.errors import Cancelled, DeadlineExceeded, Draining
from packlight.core.types import ModelSpec
from packlight.router.answer import Envelope, StreamedAnswer, WholeAnswer, system_fingerprint
from packlight.router.choice import Choice
from packlight.router.dialect import Dialect
from packlight.router.disconnect import read_body, until_disconnect
from packlight.router.errors import Outcome, Problem, log_problem, problem_of
from packlight.router.explain import explanation
from packlight.router.generation import Generation
from packlight.router.job import Job, JobReader
from packlight.router.keepalive import KeepAlive
from packlight.router.limits import Gate, Slot
from packlight.router.middleware import request_id_of
from packlight.router.server_timing import server_timing_header
from packlight.router.service import Backend, ServedModel
from packlight.router.spans import Told, end_answer, start_answer
from packlight.router.sse import Reply
from packlight.router.usage import num_cached_tokens, usage_report
from packlight.router.validate import warning_header
from packlight.telemetry.logs import log_event
from packlight.telemetry.metrics import RouterMetrics
from packlight.telemetry.traces import Tracer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What every request needs. `clock` measures durations, `wall_clock` tells the date."""

    config: RouterConfig
    model: ServedModel
    backend: Backend
    metrics: RouterMetrics
    gate: Gate
    reader: JobReader
    tracer: Tracer
    clock: Callable[[], float]
    wall_clock: Callable[[], float]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


class GenerationEndpoint:
    """The ASGI application of one dialect."""

    def __init__(self, services: Services, dialect: Dialect[Any]) -> None:
        self._services, self._dialect = services, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _Exchange(self._services, self._dialect, scope, receive, send).run()


class _Exchange:
    """One request and its reply."""

    def __init__(self, services: Services, dialect: Dialect[Any], scope: Scope, receive: Receive, send: Send) -> None:
        self._services, self._dialect = services, dialect
        self._scope, self._receive = scope, receive
        self._reply = Reply(send)
        self._request_id = request_id_of(scope)
        self._answer_id = dialect.id_prefix + uuid4().hex
        self._started_at = services.clock()
        self._span = start_answer(services.tracer, scope, dialect.name, services.spec.name)
        self._prepare_s = 0.0
        self._job: Job | None = None
        self._choices: list[Choice] = []
        self._num_samples = 1
        self._problem: Problem | None = None

    async def run(self) -> None:
        """Never raises, except when the server itself is cancelled. Ends in exactly one outcome, which is counted."""
        self._services.metrics.request_started(self._dialect.name)
        outcome = Outcome.CANCELLED
        try:
            await self._serve()
            outcome = Outcome.COMPLETED
        except Exception as error:
            outcome = await self._fail(error)
        finally:
            self._account(outcome)

    async def _serve(self) -> None:
        with self._services.gate.enter() as slot:
            try:
                async with asyncio.timeout(self._services.config.request_timeout_s) as deadline:
                    slot.ends_with(deadline)
                    data = await read_body(self._scope, self._receive, self._services.config.max_body_bytes)
                    await until_disconnect(self._answer(data, slot), self._receive, lambda: self._reply.is_complete)
            except TimeoutError:
                if not deadline.expired():
                    raise
                if slot.is_given_up:
                    raise Draining(
                        "This server is shutting down and could not wait for the whole answer. Please try again: "
                        "another one will answer."
                    ) from None
                raise DeadlineExceeded(
                    f"The answer was not complete after {self._services.config.request_timeout_s:g} s, the longest "
                    "this server allows."
                ) from None

    async def _answer(self, data: bytes, slot: Slot) -> None:
        job = await asyncio.to_thread(
            self._services.reader.read, data, self._dialect, self._answer_id, self._time_left_s, self._span.context
        )
        slot.grow(len(job.requests))
        self._note(job)
        self._choices = [self._choice(job, index) for index in range(len(job.requests))]
        async with Generation(self._services.backend, self._choices, self._services.clock) as generation:
            await (self._send_stream if job.stream else self._send_whole)(job, generation)

    def _choice(self, job: Job, index: int) -> Choice:
        request = job.requests[index]
        reader = job.calls.reader(request.request_id) if job.calls else None
        return Choice(index, request, self._services.model.tokenizer, job.stops, job.plans[index], reader)

    async def _send_stream(self, job: Job, generation: Generation) -> None:
        answer = StreamedAnswer(job, self._dialect, self._envelope(), self._choices)
        with KeepAlive(self._reply, self._services.config.keepalive_s):
            async for delta in generation.deltas():
                if not self._reply.is_streaming:
                    await self._reply.open_stream(self._headers(job))
                await self._reply.send_events(answer.chunks(delta))
        if job.include_usage:
            await self._reply.send_events([answer.usage_chunk(await self._report(job))])
        await self._reply.close_stream()

    async def _send_whole(self, job: Job, generation: Generation) -> None:
        answer = WholeAnswer(self._dialect, self._envelope(), self._choices)
        async for delta in generation.deltas():
            answer.add(delta)
        report = await self._report(job)
        headers = self._headers(job) | server_timing_header(report)
        await self._reply.send_json(answer.body(report), headers=headers)

    async def _report(self, job: Job) -> dict[str, Any]:
        report = usage_report(job, self._choices, self._prepare_s)
        if job.explain and report["kv"] is not None:
            tokenizer = self._services.model.tokenizer
            report["kv"]["explain"] = await asyncio.to_thread(explanation, self._choices[0], tokenizer)
        return report

    async def _fail(self, error: Exception) -> Outcome:
        self._problem = problem = problem_of(error)
        self._services.metrics.count_error(problem.kind)
        log_problem(problem, error, self._request_id, self._answer_id, self._span.context)
        try:
            await self._reply.fail(problem)
        except Exception as unsent:
            log_event(_log, logging.DEBUG, "error not sent", request=self._request_id, reason=repr(unsent))
        return problem.outcome

    def _envelope(self) -> Envelope:
        spec = self._services.spec
        return Envelope(self._answer_id, int(self._services.wall_clock()), spec.name, system_fingerprint(spec))

    def _headers(self, job: Job) -> dict[str, str]:
        return warning_header(job.ignored, job.loosened)

    def _elapsed_s(self) -> float:
        return self._services.clock() - self._started_at

    def _time_left_s(self) -> float:
        return max(self._services.config.request_timeout_s - self._elapsed_s(), 0.0)

    def _note(self, job: Job) -> None:
        self._job, self._num_samples, self._prepare_s = job, job.num_samples, self._elapsed_s()
        self._span.child("prepare", self._started_at, self._started_at + self._prepare_s)
        metrics = self._services.metrics
        metrics.observe_prepare(self._prepare_s)
        metrics.count_prompt(job.num_prompt_tokens)
        metrics.count_ignored(len(job.ignored))

    def _account(self, outcome: Outcome) -> None:
        seconds = self._elapsed_s()
        for choice in self._choices:
            observe_choice(self._services.metrics, choice, self._started_at)
        self._services.metrics.count_cached(num_cached_tokens(self._choices, self._num_samples))
        self._services.metrics.request_ended(self._dialect.name, outcome, seconds)
        log_event(
            _log,
            logging.INFO,
            self._dialect.name,
            trace=self._span.context,
            request=self._request_id,
            answer=self._answer_id,
            retry=_retry_count(self._scope),
            outcome=outcome.value,
            status=self._status,
            error=self._problem.kind if self._problem else "-",
            prompt=sum(choice.request.num_prompt_tokens for choice in self._choices),
            generated=sum(choice.num_generated for choice in self._choices),
            seconds=round(seconds, 3),
        )
        self._end_span(outcome)

    @property
    def _status(self) -> int:
        return self._reply.status or Cancelled.http_status

    def _end_span(self, outcome: Outcome) -> None:
        began = [choice.first_token_at for choice in self._choices if choice.first_token_at is not None]
        told = Told(
            request_id=self._request_id,
            answer_id=self._answer_id,
            model=self._services.spec.name,
            outcome=outcome,
            status=self._status,
            problem=self._problem,
            job=self._job,
            choices=self._choices,
            prepare_s=self._prepare_s,
            first_token_s=min(began) - self._started_at if began else None,
        )
        end_answer(self._span, told)


def _retry_count(scope: Scope) -> str:
    """What OpenAI's clients say of themselves; it tells load from retries."""
    count = Headers(scope=scope).get("x-stainless-retry-count", "0")
    return count if count.isdecimal() and len(count) < 4 else "?"


def observe_choice(metrics: RouterMetrics, choice: Choice, started_at: float) -> None:
    """What one choice contributes, complete or not."""
    metrics.count_generated(choice.num_generated)
    if choice.first_token_at is not None and choice.last_token_at is not None:
        metrics.observe_first_token(choice.first_token_at - started_at)
        if choice.num_generated > 1:
            metrics.observe_per_token((choice.last_token_at - choice.first_token_at) / (choice.num_generated - 1))
    if choice.usage is not None:
        metrics.observe_timings(choice.usage.timings)
        metrics.observe_kv(choice.usage.kv)
        if choice.packing.is_auto:
            metrics.count_auto(choice.packing.pack.recipe)
