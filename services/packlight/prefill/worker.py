"""The prefill worker: exact KV in, selected KV out.

One loop owns all state: admit, plan, run, commit, emit. Only this file awaits; who is here is in `roster.py`, what to
compute is decided in `scheduler.py`, what to keep in `compress/`, and how bytes look in `transfer/`.

A request is retired when its last layer is packed, when its reader goes away, or when its step fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from packlight.compress.budget import keeps_all
from packlight.core.config import PrefillConfig
from packlight.core.errors import Draining, InternalError, PacklightError, QueueFull, RequestNeverFits
from packlight.core.hashing import page_hashes
from packlight.core.shipping import FirstToken, PrefillEvent, Waiting
from packlight.core.types import PrefillRequest, Token
from packlight.core.workers import WorkerLoad
from packlight.engine.compute import Compute
from packlight.engine.device import find_lost
from packlight.engine.runner import PrefillRunner, Runner
from packlight.models.grammar import Grammars, constraint_of
from packlight.prefill.blocks import Blocks
from packlight.prefill.dispatch import Dispatch
from packlight.prefill.marks import Marks
from packlight.prefill.meter import Meter
from packlight.prefill.outbox import Outbox
from packlight.prefill.roster import Roster
from packlight.prefill.scheduler import ChunkPlan, plan_step, step_room
from packlight.prefill.shadow import Shadows
from packlight.prefill.shipper import Shipment
from packlight.prefill.spans import tell_span
from packlight.prefill.step import run_step
from packlight.prefill.task import Task
from packlight.telemetry.logs import log_event
from packlight.telemetry.metrics import PrefillMetrics
from packlight.telemetry.traces import NO_TRACER, Kind, Span, Tracer, ending
from packlight.transfer.base import Site

log = logging.getLogger(__name__)
Clock = Callable[[], float]

REASSURE_S = 2.0
"""How often who waits is told that the worker steps."""

LONGEST_STEP_S = 10.0
"""While it steps, nobody hears of a worker; decode workers bear a silence of `decode.prefill_timeout_s`."""


class PrefillWorker:
    """Answers `prefill` calls. Create it on the event loop, then keep `run` running until `close`."""

    def __init__(
        self,
        config: PrefillConfig,
        runner: PrefillRunner,
        compute: Compute,
        *,
        metrics: PrefillMetrics,
        grammars: Grammars | None = None,
        tracer: Tracer = NO_TRACER,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config, self._runner, self._compute = config, runner, compute
        self._meter, self._tracer, self._clock = Meter(metrics, clock), tracer, clock
        self._grammars = grammars
        self.blocks = Blocks(runner.pool.num_blocks, runner.pool.page_size)
        self._dispatch = Dispatch(
            runner, Site(config.host, config.advertise, runner.pool.device, on_link=metrics.count_link)
        )
        shadow_ratio = config.shadow_ratio if isinstance(runner, Runner) else 0.0
        self._shadows = Shadows(shadow_ratio, runner, compute, self.blocks.book, metrics)
        self._roster = Roster(self.blocks, max_running=2 * config.max_prompts)
        self._wake = asyncio.Event()
        self.draining = False

    # ── the public side ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def compatibility(self) -> str:
        return self._dispatch.compatibility

    @property
    def max_tokens(self) -> int:
        """The longest prompt that the pool holds."""
        return self.blocks.book.num_pages * self._runner.pool.page_size

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        """The events of one request, see `core/shipping.py`. Closing the iterator cancels the rest of the work.

        Raises QueueFull, Draining, RequestNeverFits or ShipmentIncompatible before anything is computed."""
        with ending(self._tracer.start("prefill", request.trace, kind=Kind.SERVER)) as span:
            task = self._accept(request, span)
            try:
                async with aclosing(task.outbox.read()) as events:
                    async for event in events:
                        yield event
            finally:
                self._leave(task)

    async def run(self) -> None:
        """Step for ever. A step that raises fails its requests, not the worker; books that do not balance end it, and
        so does a device that is lost."""
        try:
            while True:
                if not self._roster.uncomputed:
                    self.blocks.check_idle()
                    self._wake.clear()
                    await self._wake.wait()
                await self._step()
        finally:
            self._dispatch.close()

    def load(self) -> WorkerLoad:
        roster, pace = self._roster, self._meter.pace
        return WorkerLoad(
            num_running=roster.num_running,
            num_queued=len(roster.queue),
            num_queued_tokens=sum(task.num_left for task in roster.uncomputed),
            num_free_pages=self.blocks.num_available,
            num_total_pages=self.blocks.book.num_pages,
            tokens_per_s=1.0 / pace.token_s if pace else 0.0,
            ship_bytes_per_s=self._meter.ship_bytes_per_s,
            fixed_s=pace.fixed_s if pace else 0.0,
            idle_s=0.0 if roster.uncomputed else self._meter.idle_s,
        )

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self.draining = True

    @property
    def num_unfinished(self) -> int:
        return self._roster.num_unfinished

    def check(self) -> None:
        """Verify the page books against every task that holds blocks."""
        self.blocks.check(self._roster.admitted)

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _step(self) -> None:
        self._roster.drop_cancelled()
        self._admit()
        admitted = self._roster.admitted
        plan = plan_step(
            [task.progress() for task in admitted],
            chunk_tokens=self._room(),
            max_prompts=self._config.max_prompts,
        )
        if not plan:
            self._wake.clear()
            await self._wake.wait()
            return
        tasks = [admitted[chunk.index] for chunk in plan]
        try:
            ran = await self._compute.prefill(partial(run_step, self._runner, self._dispatch, plan, tasks))
        except Exception as error:
            lost = (await self._compute.prefill(partial(find_lost, self._runner.pool.device))).result
            self._fail(tasks, lost or error)
            if lost is not None:
                raise lost from error
            return
        self._meter.step(len(plan), sum(chunk.end - chunk.start for chunk in plan), ran.took_s)
        self._commit(plan, tasks, *ran.result)
        self._reassure()
        await self._shadows.compare_all()

    def _room(self) -> int:
        return step_room(
            self._config.chunk_tokens,
            self._runner.pool.page_size,
            tokens_per_s=self._meter.recent_tokens_per_s,
            max_s=self._compute.max_prefill_s or LONGEST_STEP_S,
        )

    def _admit(self) -> None:
        for task in self._roster.admit(self._room()):
            task.started_s = self._clock()
            try:
                task.accumulated = self._dispatch.mass_for(task)
            except QueueFull as error:
                self._fail([task], error)
        self._show_state()

    def _show_state(self) -> None:
        queue = self._roster.queue
        oldest_wait_s = self._clock() - queue[0].arrived_s if queue else 0.0
        self._meter.state(len(queue), oldest_wait_s, self._roster.num_running, self.blocks.book)

    def _commit(
        self,
        plan: Sequence[ChunkPlan],
        tasks: Sequence[Task],
        tokens: Sequence[Token | PacklightError],
        shipments: Sequence[Shipment],
    ) -> None:
        ended = iter(zip(tokens, shipments, strict=True))
        for chunk, task in zip(plan, tasks, strict=True):
            task.num_done = chunk.end
            if task.marks is not None:
                task.marks.chunks.append((chunk.start, chunk.end, self._clock()))
            result = next(ended) if chunk.end == task.num_tokens else None
            if result is None:
                continue
            task.is_sound = isinstance(result[0], Token)
            if not task.cancelled:
                self._finish(task, *result)

    def _reassure(self) -> None:
        """Whoever waits learns that the worker steps. Without steps nobody does: that is what a silence means."""
        now = self._clock()
        for task in self._roster.uncomputed:
            if now - task.told_s >= REASSURE_S:
                task.told_s = now
                task.outbox.put(Waiting())

    def _finish(self, task: Task, token: Token | PacklightError, shipment: Shipment) -> None:
        if isinstance(token, Token) and shipment.shadow is not None:
            shadow = tuple(shipment.shadow)
            self._shadows.add(task.request.pack, shadow, task.blocks, task.num_tokens, token.token_id)
        self._retire(task)
        if isinstance(token, PacklightError):
            self._meter.failed(token)
            task.outbox.fail(token)
            return
        task.outbox.put(FirstToken(token, task.num_cached))
        shipped = shipment.shipped(
            self._runner.model.spec,
            self._runner.pool.dtype.itemsize,
            queue_s=task.started_s - task.arrived_s,
            prefill_s=self._clock() - task.started_s,
        )
        task.shipped = shipped
        task.outbox.put(shipped)
        self._meter.finished(task, shipped)

    def _retire(self, task: Task) -> None:
        self._roster.retire(task)
        self._show_state()

    def _fail(self, tasks: Sequence[Task], error: Exception) -> None:
        """A step raised: its requests end with an error."""
        reported = error if isinstance(error, PacklightError) else InternalError(f"prefill step failed: {error!r}")
        answers = " ".join(task.request.request_id for task in tasks)
        log_event(log, logging.ERROR, "step failed", exc_info=error, answers=answers)
        for task in tasks:
            task.is_sound = False
            if not task.cancelled:  # nobody listens; the next step begins by retiring it
                self._meter.failed(reported)
                self._retire(task)
                task.outbox.fail(reported)

    # ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────

    def _accept(self, request: PrefillRequest, span: Span) -> Task:
        try:
            self._refuse(request)
        except PacklightError:
            self._meter.refused()
            raise
        task = self._new_task(request, span)
        self._roster.queue.append(task)
        self._show_state()
        self._wake.set()
        return task

    def _new_task(self, request: PrefillRequest, span: Span) -> Task:
        spec, pool = self._runner.model.spec, self._runner.pool
        resumed = request.token_ids[request.num_prompt_tokens :]
        constraint = constraint_of(self._grammars, request.sampling.grammar, resumed)
        transport, sender = self._dispatch.connect(request.transports)
        return Task(
            request=request,
            hashes=page_hashes(
                request.token_ids, pool.page_size, fingerprint=spec.fingerprint, salt=request.cache_salt
            ),
            outbox=Outbox(),
            arrived_s=(now := self._clock()),
            told_s=now,
            transport=transport,
            sender=sender,
            window=1 if keeps_all(request.pack, request.num_prompt_tokens) else request.pack.window,
            has_shadow=self._shadows.wants(request),
            constraint=constraint,
            span=span,
            marks=Marks() if span.is_recording else None,
        )

    def _refuse(self, request: PrefillRequest) -> None:
        if self.draining:
            raise Draining("this prefill worker is shutting down", retry_after_s=1.0)
        if len(self._roster.queue) >= self._config.max_queue:
            raise QueueFull(f"prefill queue is full ({self._config.max_queue} requests wait)", retry_after_s=1.0)
        self._runner.model.spec.check_prompt(request.token_ids, request.num_prompt_tokens)
        num_blocks = -(-len(request.token_ids) // self._runner.pool.page_size)
        if num_blocks > self.blocks.book.num_pages:
            raise RequestNeverFits(
                f"the prompt needs {num_blocks} KV blocks, the prefill pool has {self.blocks.book.num_pages}: "
                "send a shorter prompt or raise prefill.kv_memory_bytes"
            )

    def _leave(self, task: Task) -> None:
        """The reader is gone, with or without having read everything."""
        self._meter.left(task)
        self._roster.leave(task)
        if task.marks is not None:
            tell_span(task, task.marks, self._clock())
        self._wake.set()
