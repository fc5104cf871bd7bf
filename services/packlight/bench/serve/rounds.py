"""All turns of a run, in the order that makes them comparable.

Every round gives each server one turn under each cell. Servers take their turns one at a time and right after each
other, in an order that rotates from round to round, so that what else happens on the machine hits all of them alike;
only figures of the same round are divided by each other.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import httpx

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.client import Client
from packlight.bench.serve.gauge import PeakGauge
from packlight.bench.serve.loads import Load, arrivals
from packlight.bench.serve.pause import paused
from packlight.bench.serve.prompts import Prompts, Question
from packlight.bench.serve.results import Turn
from packlight.bench.serve.targets import Target
from packlight.bench.serve.turn import Pace, prefill_first, run_closed, run_open
from packlight.bench.serve.workloads import Conversation, Size, Workload

_WAKE_TRIES, _WAKE_PAUSE_S = 25, 0.2


class Row(NamedTuple):
    """A server, and the model to name when asking it."""

    target: Target
    model: str


class Work(NamedTuple):
    """What one turn asks, and when."""

    round: int
    size: Size
    load: Load
    seed: str
    conversations: Sequence[Conversation]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does. `cells` are sizes of conversations, each under a load."""

    rows: tuple[Row, ...]
    workload: Workload
    cells: tuple[tuple[Size, Load], ...]
    num_rounds: int
    max_tokens: int
    seed: int
    prefill_first: bool
    gauge: str


async def take_turns(plan: Plan, prompts: Prompts, http: httpx.AsyncClient, pace: Pace) -> AsyncGenerator[Turn, None]:
    """The turns, as they are over. Closing the generator ends the turn in progress."""
    for index in range(plan.num_rounds):
        for size, load in plan.cells:
            made: dict[str, list[Conversation]] = {}
            for row in rotated(plan.rows, index):
                seed = seed_of(plan, index, size, load, row)
                if seed not in made:
                    made[seed] = plan.workload.make(size, seed, prompts)
                work = Work(index, size, load, seed, made[seed])
                yield await _take_turn(plan, work, row, prompts, http, pace)


def rotated(rows: Sequence[Row], index: int) -> list[Row]:
    start = index % len(rows)
    return [*rows[start:], *rows[:start]]


def seed_of(plan: Plan, index: int, size: Size, load: Load, row: Row) -> str:
    """Servers are asked the same in the same round. Rows that are one server are not: it would know the prompts from
    the row before."""
    same = [other for other in plan.rows if other.target.url == row.target.url].index(row)
    return f"{plan.seed}/{index}/{size.prompt_tokens}/{load.label}/{same}"


async def _take_turn(plan: Plan, work: Work, row: Row, prompts: Prompts, http: httpx.AsyncClient, pace: Pace) -> Turn:
    others = [other.target.pid for other in plan.rows if other.target.url != row.target.url]
    with paused([pid for pid in others if pid is not None]):
        client = Client(row.target, row.model, http, prompts, pace.clock, plan.max_tokens)
        await wake(client, f"wake {work.seed}", pace)
        if plan.prefill_first:
            await prefill_first(client, work.conversations)
        gauge = PeakGauge(row.target.metrics_url, plan.gauge, http) if row.target.metrics_url is not None else None
        async with gauge or nullcontext():
            started = pace.clock()
            own = Pace(lambda: pace.clock() - started, pace.sleep)
            answers = await _ask(Client(row.target, row.model, http, prompts, own.clock, plan.max_tokens), work, own)
    return Turn(
        round=work.round,
        server=row.target.name,
        prompt_tokens=work.size.prompt_tokens,
        load=work.load.label,
        concurrency=work.load.concurrency,
        answers=tuple(answers),
        peak=gauge.peak if gauge is not None else None,
    )


async def _ask(client: Client, work: Work, pace: Pace) -> list[Answer]:
    """The part that counts, on a clock that begins with it."""
    if work.load.concurrency is not None:
        return await run_closed(client, work.conversations, work.load.concurrency)
    assert work.load.rate is not None
    return await run_open(
        client, work.conversations, arrivals(work.load.rate, len(work.conversations), work.seed), pace
    )


async def wake(client: Client, tag: str, pace: Pace) -> bool:
    """A short request, untimed, until one is answered: a server that stood still may need a moment to be ready.

    One that never answers shows so in its turn."""
    for _ in range(_WAKE_TRIES):
        if (await client.ask(tag, Question("Hello"), max_tokens=2)).error is None:
            return True
        await pace.sleep(_WAKE_PAUSE_S)
    return False


def make_pace() -> Pace:
    return Pace(time.perf_counter)
