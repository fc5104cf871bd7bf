"""The `usage` of an answer: what was read, written and shipped for it.

Knows token counts and what packing reported. Prompt tokens count once per prompt, not once per choice. The `kv` object
is an extension of OpenAI's schema; after a stop string, which ends the answer early, it says what was known by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from packlight.compress.policy import AUTO, Decision
from packlight.core.types import PackSpec, Usage
from packlight.router.choice import Choice
from packlight.router.job import Job


def usage_counts(job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
    """The token counts so far."""
    num_generated = sum(choice.num_generated for choice in choices)
    return {
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": job.num_prompt_tokens + num_generated,
    }


def usage_report(job: Job, choices: Sequence[Choice], prepare_s: float) -> dict[str, Any]:
    """The whole report, when every choice is done. `prepare_s` is what reading the request took."""
    return {
        **usage_counts(job, choices),
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens(choices, job.num_samples)},
        "kv": _kv_report(job, choices, prepare_s),
    }


def num_cached_tokens(choices: Sequence[Choice], num_samples: int) -> int:
    """What was cached before the request. Later samples of a prompt find what the first one left: the least counts."""
    reports = _reports(choices, num_samples)
    return sum(min((usage.num_cached_tokens for usage in usages), default=0) for usages in reports)


def _reports(choices: Sequence[Choice], num_samples: int) -> list[list[Usage]]:
    """The reports there are, by prompt."""
    samples = [choices[at : at + num_samples] for at in range(0, len(choices), num_samples)]
    return [[choice.usage for choice in group if choice.usage is not None] for group in samples]


def _kv_report(job: Job, choices: Sequence[Choice], prepare_s: float) -> dict[str, Any] | None:
    by_prompt = _reports(choices, job.num_samples)
    usages = [usage for reports in by_prompt for usage in reports]
    if not usages:
        return None
    masses = [usage.kv.retained_mass for usage in usages if usage.kv.retained_mass is not None]
    packings = [choice.packing for choice in choices if choice.usage is not None]
    return {
        **_chosen(packings),
        "recipe": _all_names(usage.kv.recipe for usage in usages),
        "codec": _all_names(usage.kv.codec for usage in usages),
        **_asked([packing.pack for packing in packings]),
        "prompt_tokens": job.num_prompt_tokens,
        "kept_tokens": _num_tokens(by_prompt, "num_kept_tokens"),
        "grown_tokens": _num_tokens(by_prompt, "num_grown_tokens"),
        "read_tokens": _num_tokens(by_prompt, "num_read_tokens"),
        "shipped_bytes": sum(usage.kv.shipped_bytes for usage in usages),
        "exact_bytes": sum(usage.kv.exact_bytes for usage in usages),
        "attention_mass_retained": min(masses) if masses else None,
        "timings_ms": _timings_ms(usages, prepare_s),
    }


def _chosen(packings: Sequence[Decision]) -> dict[str, Any]:
    """What the policy did, if it was asked. Prompts of one request may differ in length, and so in their reasons."""
    if not packings[0].is_auto:
        return {}
    return {
        "policy": AUTO,
        "reason": " | ".join(dict.fromkeys(packing.reason for packing in packings)),
        "protected_tokens": max(packing.num_protected for packing in packings),
    }


def _asked(packs: Sequence[PackSpec]) -> dict[str, Any]:
    """The size and the floor that were aimed at; null where prompts differ, or where the recipe has no such thing."""
    wanted = {"budget": "budget_tokens", "ratio": "ratio", "floor": "mass_floor"}
    values = {name: {getattr(pack, field) for pack in packs} for name, field in wanted.items()}
    return {name: found.pop() if len(found) == 1 else None for name, found in values.items()}


def _all_names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _num_tokens(by_prompt: list[list[Usage]], field: str) -> float:
    """Per layer and KV head: means over the samples of a prompt, summed over prompts."""
    means = [mean(getattr(usage.kv, field) for usage in reports) for reports in by_prompt if reports]
    return float(round(sum(means), 2))


def _timings_ms(usages: list[Usage], prepare_s: float) -> dict[str, float]:
    """Choices run side by side, so each part is that of the choice that took longest for it."""
    parts = [{name.removesuffix("_s"): value for name, value in asdict(usage.timings).items()} for usage in usages]
    longest = {name: max(part[name] for part in parts) for name in parts[0]}
    return {name: round(1000 * value, 3) for name, value in {"prepare": prepare_s, **longest}.items()}
