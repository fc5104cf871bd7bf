"""What is known of a worker: who it is, what it says of its load, what it offers.

Knows the values that heartbeats carry and placement reads. Does not know requests, nor where heartbeats go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

WorkerId = str


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker says of itself in each heartbeat: enough to predict how long a new request would wait there.

    Prefilling n tokens takes `fixed_s + n / tokens_per_s` of computing; `step_s` is one decode step's. 0 is unknown.
    These are figures of a worker's last steps; `idle_s` ago one that prefills had the last of them.
    `ship_bytes_per_s` is what a prefill worker ships to whomever, `link_bytes_per_s` what a decode worker gets from
    each prefill worker that it has measured."""

    num_running: int = 0
    num_queued: int = 0
    num_queued_tokens: int = 0
    num_free_pages: int = 0
    num_total_pages: int = 0
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    ship_bytes_per_s: float = 0.0
    fixed_s: float = 0.0
    idle_s: float = 0.0
    link_bytes_per_s: Mapping[WorkerId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalPrefill:
    """What a decode worker says of the prompts that it prefills itself, on the cores that it decodes on.

    `worker_id` names it where a prefill worker is named: in requests and in the prefix index. A prompt has
    `max_tokens` at most; while anything decodes, its chunks take `max_stall_s` each."""

    worker_id: WorkerId
    max_tokens: int
    max_stall_s: float
    load: WorkerLoad = field(default_factory=WorkerLoad)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker. `generation` grows with every restart of the same id, so that old claims can be told apart.
    `local_prefill` is None unless it is a decode worker that also prefills. `speaks_tls` is how it is called."""

    worker_id: WorkerId
    generation: int
    role: Role
    address: str
    model: str
    fingerprint: str
    compatibility: str
    page_size: int = 16
    max_context: int = 0
    draining: bool = False
    load: WorkerLoad = field(default_factory=WorkerLoad)
    local_prefill: LocalPrefill | None = None
    speaks_tls: bool = False
