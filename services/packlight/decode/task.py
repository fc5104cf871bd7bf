"""One request on a decode worker: how far it is, and what it holds. Plain state, owned by the worker.

QUEUED ──admit──▶ FETCHING ──all layers stored──▶ READY ──joins the batch──▶ RUNNING ──▶ CLOSED
   holds nothing    holds a row, pages, and a reservation for all it can ever need        holds nothing
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from packlight.core.shipping import Shipped
from packlight.core.types import GenerateEvent, GenerateRequest, KVUsage, Timings, Token, Usage
from packlight.engine.sampler import PenaltyState

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
    num_reserved_pages: int
    arrived_s: float
    stage: Stage = Stage.QUEUED
    row: int = -1
    generated: list[int] = field(default_factory=list)
    penalties: PenaltyState | None = None
    num_cached_tokens: int = 0
    received_bytes: int = 0
    shipped: Shipped | None = None
    timings: Timings = field(default_factory=Timings)
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    ready_s: float = 0.0
    fetch: asyncio.Task[None] | None = None
    alarm: asyncio.TimerHandle | None = None
    cancelled: bool = False

    @property
    def num_resumed(self) -> int:
        """Tokens of the answer that an earlier worker generated."""
        return len(self.request.token_ids) - self.request.num_prompt_tokens

    def prompt_and_resumed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        border = self.request.num_prompt_tokens
        return self.request.token_ids[:border], self.request.token_ids[border:]

    @property
    def num_generated(self) -> int:
        """Of the whole answer."""
        return self.num_resumed + len(self.generated)

    @property
    def next_position(self) -> int:
        """The position of the newest token, which the next step stores."""
        return len(self.request.token_ids) + len(self.generated) - 1

    def add(self, token: Token) -> None:
        self.generated.append(token.token_id)
        if self.penalties is not None:
            self.penalties.add(token.token_id)

    def note(self, **timings: float) -> None:
        self.timings = replace(self.timings, **timings)

    def usage(self) -> Usage:
        kv = KVUsage(recipe=self.request.pack.recipe, shipped_bytes=self.received_bytes)
        if self.shipped is not None:
            kv = KVUsage(
                recipe=self.request.pack.recipe,
                num_kept_tokens=self.shipped.num_kept_tokens,
                shipped_bytes=self.shipped.shipped_bytes,
                exact_bytes=self.shipped.exact_bytes,
                retained_mass=self.shipped.retained_mass,
            )
        return Usage(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_cached_tokens=min(self.num_cached_tokens, self.request.num_prompt_tokens),
            num_generated_tokens=self.num_generated,
            kv=kv,
            timings=self.timings,
        )
