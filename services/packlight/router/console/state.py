"""What the console shows that is not an answer: the settings there are, and the fleet as it is now.

Pure: facts in, JSON out. Aggregates only: no prompt, no text, no id of a request, and no worker's address.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry

from packlight import __version__
from packlight.compress.parts import codecs_for
from packlight.compress.policy import Policy
from packlight.compress.recipes import RECIPES, Recipe
from packlight.core.config import Config
from packlight.core.types import ModelSpec
from packlight.core.workers import Role, WorkerInfo, WorkerLoad
from packlight.router.service import Readiness

TOTALS = ("requests", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "shipped_bytes", "exact_bytes")
"""Counters of the router, since it started, over all labels."""

Json = dict[str, Any]


def settings(config: Config, spec: ModelSpec) -> Json:
    """What a request may ask of this server, and what it gets without asking. Does not change while the server runs."""
    return {
        "version": __version__,
        "model": {
            "name": spec.name,
            "max_context": spec.max_context,
            "num_layers": spec.num_layers,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "dtype": spec.dtype,
        },
        "page_tokens": config.kv.page_size,
        "default_recipe": config.kv.recipe,
        "default_max_tokens": config.router.default_max_tokens,
        "recipes": [_recipe(recipe) for recipe in RECIPES.values() if _can_have(recipe, spec)],
        "codecs": list(codecs_for(spec.head_dim)),
        "policy": _policy(config, spec),
    }


def fleet(workers: Iterable[WorkerInfo], readiness: Readiness, registry: CollectorRegistry) -> Json:
    """The workers as their last heartbeats told, and what this router has done so far."""
    by_role = sorted(workers, key=lambda worker: (list(Role).index(worker.role), worker.worker_id))
    return {
        "ready": readiness.ready,
        "details": dict(readiness.details),
        "workers": [_worker(worker) for worker in by_role],
        "totals": totals(registry),
    }


def totals(registry: CollectorRegistry) -> dict[str, float]:
    """The counters `TOTALS`, each summed over its labels."""
    names = {f"packlight_router_{name}_total": name for name in TOTALS}
    found = dict.fromkeys(TOTALS, 0.0)
    for family in registry.restricted_registry(list(names)).collect():
        for sample in family.samples:
            if sample.name in names:
                found[names[sample.name]] += sample.value
    return found


def _recipe(recipe: Recipe) -> Json:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "parts": [part for part in (recipe.scorer, recipe.budget, recipe.reader) if part is not None],
        "paper": recipe.paper,
        "has_budget": recipe.has_budget,
        "ratio": recipe.ratio if recipe.has_budget else None,
        "codec": recipe.codec,
    }


def _can_have(recipe: Recipe, spec: ModelSpec) -> bool:
    return not recipe.divides_heads or spec.num_kv_heads > 1


def _policy(config: Config, spec: ModelSpec) -> Json:
    """What `auto` does, row by row; the fleet's own default may be another recipe."""
    rows = [
        {"min_tokens": start, "recipe": row.recipe, "ratio": row.ratio}
        for start, row in Policy(config.kv, spec).starts()
        if start < spec.max_context
    ]
    return {"floor": config.kv.policy.floor, "rows": rows}


def _worker(worker: WorkerInfo) -> Json:
    local = worker.local_prefill
    return {
        "id": worker.worker_id,
        "role": worker.role.value,
        "draining": worker.draining,
        **_load(worker.load),
        "local_prefill": None if local is None else {"max_tokens": local.max_tokens, **_load(local.load)},
    }


def _load(load: WorkerLoad) -> Json:
    return {
        "running": load.num_running,
        "queued": load.num_queued,
        "queued_tokens": load.num_queued_tokens,
        "free_pages": load.num_free_pages,
        "total_pages": load.num_total_pages,
        "tokens_per_s": load.tokens_per_s,
        "step_s": load.step_s,
        "ship_bytes_per_s": load.ship_bytes_per_s,
    }
