"""One request on a prefill worker: its tokens, its blocks, how far it is. Plain state, owned by the worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.budget import keeps_all
from packlight.compress.evict import evicts
from packlight.compress.recipes import find_recipe
from packlight.core.hashing import PageHash
from packlight.core.shipping import Shipped
from packlight.core.types import PrefillRequest
from packlight.kv.pages import PageIds
from packlight.models.grammar import Constraint
from packlight.prefill.marks import Marks
from packlight.prefill.outbox import Outbox
from packlight.prefill.scheduler import Progress, final_start
from packlight.telemetry.traces import NO_SPAN, Span
from packlight.transfer.base import KVSender


class Stage(StrEnum):
    QUEUED = "queued"  # waits for its turn; holds nothing
    PREFILLING = "prefilling"  # holds blocks
    SHIPPING = "shipping"  # everything is computed, blocks are back in the cache; events wait to be read
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Task:
    request: PrefillRequest
    hashes: list[PageHash]
    outbox: Outbox
    arrived_s: float
    transport: str
    window: int
    stage: Stage = Stage.QUEUED
    blocks: PageIds = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    num_cached: int = 0
    num_done: int = 0
    started_s: float = 0.0
    told_s: float = 0.0  # when the reader last heard that its turn will come
    cancelled: bool = False
    is_sound: bool = True  # False once it failed: what it computed is kept for nobody
    sender: KVSender | None = None
    accumulated: AccumulatedMass | None = None
    has_shadow: bool = False
    constraint: Constraint | None = None
    shipped: Shipped | None = None
    span: Span = NO_SPAN
    marks: Marks | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens to compute."""
        return self.num_tokens - self.num_done

    @property
    def anchor(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def needs_all_queries(self) -> bool:
        """Its selection looks at the query of every prompt token, cached or not; or decode goes on evicting by them."""
        pack = self.request.pack
        return find_recipe(pack.recipe).needs_all_queries and (evicts(pack) or not keeps_all(pack, self.anchor))

    def progress(self) -> Progress:
        return Progress(self.num_done, self.num_tokens, final_start(self.num_tokens, self.anchor, self.window))
