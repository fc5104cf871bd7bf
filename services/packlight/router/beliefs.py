"""How fast a worker is believed to be that has not worked for a while. Pure: what it says in, what to make of that out.

Knows the figures of heartbeats and how they age. Does not know requests, queues or costs.

A worker measures itself by what it is given. If one pause made it look slow, nothing more is given to it, and it would
look slow for ever. So the older a figure is, the less it counts against a worker: half of what sets it apart from the
fastest of the fleet is forgotten every `HALF_LIFE_S` without work. A worker that really is slow is asked once in a
while, says so, and has its peace again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from packlight.core.workers import Role, WorkerInfo, WorkerLoad

HALF_LIFE_S = 15.0
FRESH_S = 1.0  # less is the time between two heartbeats
NOTHING = WorkerLoad()


def as_believed(workers: Sequence[WorkerInfo], num_tokens: int) -> list[WorkerInfo]:
    """`workers` with what is believed of their speed at prompts of `num_tokens`; as they are if they work, or have
    measured nothing."""
    loads = [prefilling(worker) for worker in workers]
    fastest = min(
        (load for load in loads if load.tokens_per_s), key=lambda load: _seconds(load, num_tokens), default=None
    )
    if fastest is None:
        return list(workers)
    fastest = replace(fastest, ship_bytes_per_s=max(load.ship_bytes_per_s for load in loads))
    return [
        worker if load.idle_s <= FRESH_S else _with(worker, _nearer(load, fastest, num_tokens))
        for worker, load in zip(workers, loads, strict=True)
    ]


def prefilling(worker: WorkerInfo) -> WorkerLoad:
    """What the worker says of its prefilling: nothing, if it is a decode worker that does none."""
    if worker.local_prefill is not None:
        return worker.local_prefill.load
    return worker.load if worker.role is Role.PREFILL else NOTHING


def _with(worker: WorkerInfo, load: WorkerLoad) -> WorkerInfo:
    if worker.local_prefill is None:
        return replace(worker, load=load)
    return replace(worker, local_prefill=replace(worker.local_prefill, load=load))


def _nearer(load: WorkerLoad, fastest: WorkerLoad, num_tokens: int) -> WorkerLoad:
    """`load` with the share of its slowness that is still believed."""
    forgotten = 1.0 - 0.5 ** (load.idle_s / HALF_LIFE_S)
    if load.tokens_per_s and _seconds(load, num_tokens) > _seconds(fastest, num_tokens):
        load = replace(
            load,
            fixed_s=load.fixed_s + (fastest.fixed_s - load.fixed_s) * forgotten,
            tokens_per_s=_between(load.tokens_per_s, fastest.tokens_per_s, forgotten),
        )
    if load.ship_bytes_per_s:
        load = replace(load, ship_bytes_per_s=_between(load.ship_bytes_per_s, fastest.ship_bytes_per_s, forgotten))
    return load


def _between(own_per_s: float, fastest_per_s: float, forgotten: float) -> float:
    """By the seconds that one takes."""
    if own_per_s >= fastest_per_s:
        return own_per_s
    return 1.0 / (1.0 / own_per_s + (1.0 / fastest_per_s - 1.0 / own_per_s) * forgotten)


def _seconds(load: WorkerLoad, num_tokens: int) -> float:
    return load.fixed_s + num_tokens / load.tokens_per_s
