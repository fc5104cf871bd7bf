"""The decode worker: packed KV in, tokens out, many requests in one batch.

One loop owns all state: admit, join, run, commit, emit. Only this file and `fetch.py` await; who is here is in
`roster.py`, what a request may need is decided in `admission.py`, what it holds is in `memory.py`, what a shipment must
be in `intake.py`.

A request has one way out, `_close`. While a step runs, the requests in it are only marked: the compute thread still
reads their pages, and the next step begins by closing them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from packlight.core.config import DecodeConfig
from packlight.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    PacklightError,
    QueueFull,
    ShipmentCorrupt,
    WorkerError,
)
from packlight.core.shipping import Accepted, FirstToken, Shipped, compatibility_hash
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Progress,
    Token,
    Tokens,
    is_terminal,
)
from packlight.core.workers import WorkerLoad
from packlight.decode.fetch import Fetcher, PrefillClients
from packlight.decode.memory import DecodeMemory
from packlight.decode.meter import Meter
from packlight.decode.roster import Roster
from packlight.decode.spans import end_span
from packlight.decode.step import run_step
from packlight.decode.task import Sink, Stage, Task
from packlight.engine.compute import Compute, Decoding, Ran
from packlight.engine.device import find_lost
from packlight.engine.graphs import GraphedRunner
from packlight.engine.runner import DecodeRunner
from packlight.models.grammar import Grammars, constraint_of
from packlight.telemetry.logs import log_event
from packlight.telemetry.metrics import DecodeMetrics
from packlight.telemetry.traces import NO_TRACER, Kind, Span, Tracer, span_error, traced
from packlight.transfer.base import Site

log = logging.getLogger(__name__)
Clock = Callable[[], float]


class DecodeWorker:
    """Answers `generate` calls. Create it on the event loop, then keep `run` running until `close`."""

    def __init__(
        self,
        config: DecodeConfig,
        runner: DecodeRunner,
        compute: Compute,
        clients: PrefillClients,
        *,
        metrics: DecodeMetrics,
        grammars: Grammars | None = None,
        tracer: Tracer = NO_TRACER,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config, self._runner, self._compute = config, runner, compute
        self._meter, self._tracer, self._clock = Meter(metrics, clock), tracer, clock
        self._grammars = grammars
        self._on_graph_step = metrics.count_graph_step
        self._memory = DecodeMemory(runner.model.spec, runner.pool, num_rows=config.max_batch)
        site = Site(
            config.host,
            config.advertise,
            runner.pool.device,
            staging_bytes=config.staging_bytes,
            on_link=metrics.count_link,
        )
        self._fetcher = Fetcher(config, self._memory, self.compatibility, clients, site)
        self._roster = Roster(self._memory)
        self._wake = asyncio.Event()
        self.draining = False

    # ── the public side ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def compatibility(self) -> str:
        pool = self._runner.pool
        return compatibility_hash(self._runner.model.spec, pool.page_size, str(pool.dtype))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """The events of one request, the last one terminal. Closing the iterator cancels the rest of the work.

        Raises QueueFull, Draining or RequestNeverFits at once."""
        events: asyncio.Queue[GenerateEvent] = asyncio.Queue()
        task = self.submit(request, events.put_nowait)
        try:
            while not is_terminal(event := await events.get()):
                yield event
            yield event
        finally:
            self.cancel(task)

    def submit(self, request: GenerateRequest, sink: Sink) -> Task:
        """Accept a request whose events go to `sink`, exactly one of them terminal unless it is cancelled first."""
        span = self._tracer.start("generate", request.trace, kind=Kind.SERVER)
        try:
            task = self._accept(traced(request, span), sink, span)
        except PacklightError as error:
            self._meter.ended("refused")
            span.end(span_error(error))
            raise
        task.alarm = asyncio.get_running_loop().call_later(request.deadline_s, self._overdue, task)
        self._roster.queue.append(task)
        self._admit()
        return task

    def cancel(self, task: Task) -> None:
        """Nobody wants the rest. Frees everything now, or right after the step that is running. Idempotent."""
        if task.stage is not Stage.CLOSED and not task.cancelled:
            self._meter.ended("cancelled")
        self._end(task)

    def prepare(self, on_progress: Callable[[str], None]) -> None:
        """What takes long and can be done before the first request: on GPUs, steps are captured."""
        runner, memory, graphs = self._runner, self._memory, self._config.graphs
        if isinstance(runner, GraphedRunner):
            runner.on_mode = self._on_graph_step
            readings = memory.readings(graphs.recipes, graphs.read_tokens)
            runner.prepare(memory.table, memory.summaries, readings, on_progress=on_progress)

    async def run(self) -> None:
        """Step for ever. A step that raises fails its requests, not the worker; books that do not balance end it, and
        so does a device that is lost."""
        try:
            while True:
                if self._roster.decoding is not Decoding.NOW:
                    if not self._roster.admitted:
                        self._memory.check_idle()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._step()
        finally:
            self._fetcher.close()

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            num_running=len(self._roster.admitted),
            num_queued=len(self._roster.queue),
            num_free_pages=self._memory.reservations.num_free,
            num_total_pages=self._memory.reservations.num_total,
            step_s=self._meter.step_s,
            link_bytes_per_s=self._meter.link_bytes_per_s,
        )

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self.draining = True

    @property
    def num_unfinished(self) -> int:
        return self._roster.num_unfinished

    def check(self) -> None:
        """Verify the page books and reservations against every request that holds pages."""
        self._memory.check([task.holding for task in self._roster.admitted])

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _step(self) -> None:
        for task in [task for task in self._roster.admitted if task.cancelled]:
            self._close(task)
        batch = self._roster.join()
        if not batch:
            return
        self._memory.grow(task.holding for task in batch)
        try:
            ran = await self._run_step(batch)
        except Exception as error:
            await self._fail_step(batch, error)
        else:
            self._meter.step(len(batch), ran.waited_s, ran.took_s)
            self._commit(batch, ran.result)

    async def _run_step(self, batch: Sequence[Task]) -> Ran[list[Token | PacklightError]]:
        self._roster.stepping = batch
        try:
            return await self._compute.decode(partial(run_step, self._runner, self._memory, batch))
        finally:
            self._roster.stepping = ()

    async def _fail_step(self, batch: Sequence[Task], error: Exception) -> None:
        """Raises DeviceLost if it was not this step alone."""
        lost = (await self._compute.decode(partial(find_lost, self._memory.pool.device))).result
        reported = error if isinstance(error, PacklightError) else InternalError(f"decode step failed: {error!r}")
        answers = " ".join(task.request.request_id for task in batch)
        log_event(log, logging.ERROR, "step failed", exc_info=error, answers=answers)
        for task in batch:
            self._fail(task, lost or reported)
        if lost is not None:
            raise lost from error

    def _commit(self, batch: Sequence[Task], tokens: Sequence[Token | PacklightError]) -> None:
        self._memory.advance(task.holding for task in batch)
        for task, token in zip(batch, tokens, strict=True):
            if task.cancelled:
                self._close(task)
            elif isinstance(token, PacklightError):
                self._fail(task, token)
            else:
                self._emit(task, token)
        self._admit()

    def _emit(self, task: Task, token: Token) -> None:
        """One more token: out it goes, and perhaps the end with it."""
        task.add(token)
        if len(task.generated) == 2:
            task.note(first_step_s=self._clock() - task.ready_s)
            self._meter.first_step(task)
        task.sink(Tokens(task.request.request_id, (token,)))
        reason = task.request.stop.ends(token.token_id, task.num_generated)
        if reason is not None:
            self._finish(task, reason)

    # ── fetching the KV of one request ───────────────────────────────────────────────────────────────────────────

    async def _fetch(self, task: Task) -> None:
        """Fetch one shipment. Whatever goes wrong becomes the request's terminal event."""
        try:
            async with aclosing(self._fetcher.fetch(task)) as events:
                async for event in events:
                    if isinstance(event, Accepted):
                        task.accept(self._clock())
                        self._tell_compute()
                    elif isinstance(event, FirstToken):
                        self._begin(task, event)
                    else:
                        self._become_ready(task, event)
                    if task.stage is not Stage.FETCHING:
                        return
        except PacklightError as error:
            if isinstance(error, WorkerError):  # a shipment is wrong; what we lack is not the prefill worker's fault
                error.worker_id = error.worker_id or task.request.prefill_id
            self._fail(task, error)
        except Exception as error:
            self._fail(task, InternalError(f"fetching the KV failed: {error!r}"))

    def _begin(self, task: Task, first: FirstToken) -> None:
        """The answer has begun, perhaps before its pages are here."""
        task.first_token_s = self._clock()
        task.num_cached_tokens = first.num_cached_tokens
        task.sink(Progress(task.request.request_id, task.usage()))
        self._emit(task, first.token)

    def _become_ready(self, task: Task, shipped: Shipped) -> None:
        if not task.generated:
            raise ShipmentCorrupt("the shipment ended without a first token")
        self._memory.settle(task.holding)
        task.become_ready(shipped, self._clock())
        self._meter.arrived(task, shipped)
        task.sink(Progress(task.request.request_id, task.usage()))
        self._admit()
        self._tell_compute()
        self._wake.set()

    # ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────

    def _accept(self, request: GenerateRequest, sink: Sink, span: Span) -> Task:
        if self.draining:
            raise Draining("this decode worker is shutting down", retry_after_s=1.0)
        if len(self._roster.queue) >= self._config.max_queue:
            raise QueueFull(f"decode queue is full ({self._config.max_queue} requests wait)", retry_after_s=1.0)
        self._runner.model.spec.check_prompt(request.token_ids, request.num_prompt_tokens)
        resumed = request.token_ids[request.num_prompt_tokens :]
        constraint = constraint_of(self._grammars, request.sampling.grammar, resumed)
        holding = self._memory.plan(request)
        return Task(request, sink, holding, arrived_s=self._clock(), constraint=constraint, span=span)

    def _admit(self) -> None:
        """Start fetching for waiting requests, oldest first, as long as rows and reservations last."""
        roster = self._roster
        while (task := roster.admit_next()) is not None:
            task.admit(self._clock())
            self._meter.admitted(task)
            task.fetch = asyncio.create_task(self._fetch(task))
        oldest_wait_s = self._clock() - roster.queue[0].arrived_s if roster.queue else 0.0
        self._meter.state(len(roster.queue), oldest_wait_s, len(roster.admitted), self._memory.book)

    def _finish(self, task: Task, reason: FinishReason) -> None:
        self._meter.ended("completed")
        task.outcome = reason
        task.sink(Finished(task.request.request_id, reason, task.usage()))
        self._end(task)

    def _fail(self, task: Task, error: PacklightError) -> None:
        if task.stage is not Stage.CLOSED and not task.cancelled:
            self._meter.ended("failed", error)
            task.outcome = error
            task.sink(Failed(task.request.request_id, error))
        self._end(task)

    def _overdue(self, task: Task) -> None:
        self._fail(task, DeadlineExceeded(f"the request took longer than {task.request.deadline_s:.0f} s"))

    def _end(self, task: Task) -> None:
        if task in self._roster.stepping:
            task.cancelled = True
        else:
            self._close(task)

    def _close(self, task: Task) -> None:
        """The one way out. Idempotent."""
        if task.stage is Stage.CLOSED:
            return
        self._roster.remove(task)
        if task.alarm is not None:
            task.alarm.cancel()
        if task.fetch is not None and task.fetch is not asyncio.current_task():
            task.fetch.cancel()
        end_span(task, self._clock())
        self._admit()
        self._tell_compute()
        self._wake.set()

    def _tell_compute(self) -> None:
        """Whoever prefills on the same thread makes room for answers that run, or that are about to."""
        self._compute.set_decoding(self._roster.decoding)
