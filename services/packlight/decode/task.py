"""One request on a decode worker: how far it is, and what it holds. Plain state, owned by the worker.

QUEUED ──admit──▶ FETCHING ──all layers stored──▶ READY ──joins the batch──▶ RUNNING ──▶ CLOSED
   holds nothing    its holding is open: a row, pages, and all it can ever need           holds nothing
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from packlight.compress.budget import read_budget
from packlight.compress.recipes import codec_of
from packlight.core.errors import PacklightError
from packlight.core.shipping import Shipped
from packlight.core.types import FinishReason, GenerateEvent, GenerateRequest, KVUsage, Timings, Token, Usage
from packlight.decode.memory import Holding
from packlight.engine.sampler import PenaltyState
from packlight.models.grammar import Constraint
from packlight.telemetry.traces import NO_SPAN, Span

Sink = Callable[[GenerateEvent], None]


class Stage(StrEnum):
    QUEUED = "queued"
    FETCHING = "fetching"
    READY = "ready"
    RUNNING = "running"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Task:
    request: GenerateRequest
    sink: Sink
    holding: Holding
    arrived_s: float
    stage: Stage = Stage.QUEUED
    generated: list[int] = field(default_factory=list)
    penalties: PenaltyState | None = None
    constraint: Constraint | None = None
    num_cached_tokens: int = 0
    received_bytes: int = 0
    transport: str = ""
    shipped: Shipped | None = None
    timings: Timings = field(default_factory=Timings)
    accepted_s: float = 0.0
    first_token_s: float = 0.0
    ready_s: float = 0.0
    outcome: FinishReason | PacklightError | None = None  # None while it runs, and when nobody wants the rest
    fetch: asyncio.Task[None] | None = None
    alarm: asyncio.TimerHandle | None = None
    cancelled: bool = False
    is_arriving: bool = False  # its last chunk is being computed, or its KV is on its way
    span: Span = NO_SPAN

    @property
    def num_resumed(self) -> int:
        """Tokens of the answer that an earlier worker generated."""
        return len(self.request.token_ids) - self.request.num_prompt_tokens

    @property
    def num_generated(self) -> int:
        """Of the whole answer."""
        return self.num_resumed + len(self.generated)

    @property
    def next_position(self) -> int:
        """The position of the newest token, which the next step stores."""
        return len(self.request.token_ids) + len(self.generated) - 1

    def admit(self, now_s: float) -> None:
        """QUEUED to FETCHING."""
        self.stage = Stage.FETCHING
        self.note(decode_queue_s=now_s - self.arrived_s)
        if self.request.sampling.has_penalties:
            border = self.request.num_prompt_tokens
            self.penalties = PenaltyState(self.request.token_ids[:border], self.request.token_ids[border:])

    def accept(self, now_s: float) -> None:
        """The prefill worker is at the last chunk."""
        self.is_arriving, self.accepted_s = True, now_s

    def become_ready(self, shipped: Shipped, now_s: float) -> None:
        """FETCHING to READY."""
        self.stage, self.shipped, self.ready_s = Stage.READY, shipped, now_s
        self.note(
            prefill_queue_s=shipped.queue_s,
            prefill_s=shipped.prefill_s,
            select_s=shipped.select_s,
            transfer_s=now_s - self.first_token_s,
        )

    def add(self, token: Token) -> None:
        self.generated.append(token.token_id)
        if self.penalties is not None:
            self.penalties.add(token.token_id)
        if self.constraint is not None:
            self.constraint.add(token.token_id)

    def note(self, **timings: float) -> None:
        self.timings = replace(self.timings, **timings)

    def usage(self) -> Usage:
        pack = self.request.pack
        kv = KVUsage(recipe=pack.recipe, codec=codec_of(pack), shipped_bytes=self.received_bytes)
        if self.shipped is not None:
            kv = replace(
                kv,
                num_kept_tokens=self.shipped.num_kept_tokens,
                shipped_bytes=self.shipped.shipped_bytes,
                exact_bytes=self.shipped.exact_bytes,
                retained_mass=self.shipped.retained_mass,
                num_grown_tokens=self.shipped.num_grown_tokens,
                num_read_tokens=min(self.shipped.num_kept_tokens, read_budget(pack, self.request.num_prompt_tokens)),
                kept_map=self.shipped.kept_map,
            )
        return Usage(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_cached_tokens=min(self.num_cached_tokens, self.request.num_prompt_tokens),
            num_generated_tokens=self.num_generated,
            kv=kv,
            timings=self.timings,
        )
