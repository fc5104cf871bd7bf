"""What selecting costs: scoring, choosing and packing the prompt's KV, beside the prefill that it is part of.

Knows the prefill worker from outside. Each round prefills a prompt that nothing is cached of, shipping all of it, and
then asks for the same prompt packed by each recipe: what is cached is not computed again, but selected from anew. The
worker itself says how long it selected, and how long the prefill took.

A recipe that needs the queries of all tokens (H2O) computes the prompt again; there the cost is what its prefill took
longer than the plain one of the same round.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from packlight.bench.timing import Spread
from packlight.compress.recipes import find_recipe
from packlight.core.config import Config
from packlight.core.errors import InternalError
from packlight.core.shipping import Shipped
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.engine.build import build_runner
from packlight.engine.compute import Compute
from packlight.models.base import LanguageModel
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from packlight.transfer.registry import TRANSPORTS

EXACT = PackSpec()


@dataclass(slots=True)
class Costs:
    """Of prompts of one length, by round. `prefill_s` is without any selection; `cost_s` by recipe."""

    num_tokens: int
    prefill_s: list[float] = field(default_factory=list)
    cost_s: dict[str, list[float]] = field(default_factory=dict)
    kept_share: dict[str, float] = field(default_factory=dict)

    def share(self, recipe: str) -> Spread:
        """Of the prefill, round by round."""
        return Spread(tuple(self.cost_s[recipe])).over(Spread(tuple(self.prefill_s)))


async def measure(
    model: LanguageModel,
    config: Config,
    token_ids: tuple[int, ...],
    packs: Mapping[str, PackSpec],
    num_rounds: int,
    on_progress: Callable[[str], None],
) -> Costs:
    """The prompt `token_ids` with each recipe of `packs`."""
    costs = Costs(len(token_ids), cost_s={name: [] for name in packs})
    async with _worker(model, config) as worker:
        for index in range(num_rounds):
            on_progress(f"{len(token_ids)} tokens: round {index + 1} of {num_rounds}")
            exact = await _prefill(worker, token_ids, EXACT, f"round {index}")
            costs.prefill_s.append(exact.prefill_s - exact.select_s)
            for name, pack in packs.items():
                shipped = await _prefill(worker, token_ids, pack, f"round {index}")
                costs.cost_s[name].append(_cost_s(shipped, pack, costs.prefill_s[-1]))
                costs.kept_share[name] = shipped.num_kept_tokens / len(token_ids)
    return costs


def _cost_s(shipped: Shipped, pack: PackSpec, prefill_s: float) -> float:
    if find_recipe(pack.recipe).needs_all_queries:
        return max(0.0, shipped.prefill_s - prefill_s)
    return shipped.select_s


@asynccontextmanager
async def _worker(model: LanguageModel, config: Config) -> AsyncIterator[PrefillWorker]:
    compute, section = Compute("bench-prefill"), config.prefill.model_copy(update={"shadow_ratio": 0.0})
    runner = build_runner(model, config.model.device, config.kv, section)
    worker = PrefillWorker(section, runner, compute, metrics=PrefillMetrics(CollectorRegistry()))
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        compute.close()


async def _prefill(worker: PrefillWorker, token_ids: tuple[int, ...], pack: PackSpec, salt: str) -> Shipped:
    """Ask for a prompt, let its layers go by, and return what the worker says in the end."""
    request = PrefillRequest(
        request_id="bench",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(temperature=0.0),
        pack=pack,
        cache_salt=salt,
        transports=tuple(TRANSPORTS),
    )
    async with aclosing(worker.prefill(request)) as events:
        async for event in events:
            if isinstance(event, Shipped):
                return event
    raise InternalError("the prefill ended without saying so")
