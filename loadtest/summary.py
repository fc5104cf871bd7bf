"""What a run says: percentiles, goodput, and what packing and caches saved.

Knows answers and arithmetic. Durations are those of `packlight bench serve`; so are rates and goodput. What is added
here is the tail: a run of one server has one long series of answers, of which percentiles can be told.

A percentile needs enough values to mean anything: the smallest share above it must be at least one of them, 10 for the
90th, 100 for the 99th. With fewer there is none, only the count and the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from types import MappingProxyType
from typing import Any

from loadtest.results import LoadRun
from packlight.bench.serve.answers import Answer
from packlight.bench.serve.figures import MEASURES
from packlight.bench.timing import percentile

QUANTILES: Mapping[str, float] = MappingProxyType({"p50": 0.5, "p90": 0.9, "p99": 0.99})


@dataclass(frozen=True, slots=True)
class Latency:
    """`of` gives an answer's durations in seconds: none, one, or many. `scale` takes them to `unit`."""

    key: str
    title: str
    unit: str
    scale: float
    of: Callable[[Answer], Sequence[float]]


def _given(value: float | None) -> Sequence[float]:
    return () if value is None else (value,)


def _from_sent(value: float | None, answer: Answer) -> Sequence[float]:
    """As a client sees it that does not mind how late it was itself."""
    return () if value is None else (value - (answer.sent_s - answer.due_s),)


LATENCIES = (
    Latency("ttft_s", "TTFT", "ms", 1e3, lambda answer: _given(answer.ttft_s)),
    Latency("tpot_s", "TPOT", "ms", 1e3, lambda answer: _given(answer.tpot_s)),
    Latency("itl_s", "ITL", "ms", 1e3, lambda answer: answer.gaps_s),
    Latency("e2e_s", "E2E", "s", 1.0, lambda answer: _given(answer.e2e_s)),
    Latency("ttft_from_sent_s", "TTFT, from sending", "ms", 1e3, lambda answer: _from_sent(answer.ttft_s, answer)),
    Latency("e2e_from_sent_s", "E2E, from sending", "s", 1.0, lambda answer: _from_sent(answer.e2e_s, answer)),
)
_SHARED = ("output_tokens_per_s", "goodput_per_s", "slo_share", "found_share")


def quantile(values: Sequence[float], share: float) -> float | None:
    """None with fewer values than `least_samples(share)`."""
    return percentile(values, share) if len(values) >= least_samples(share) else None


def least_samples(share: float) -> int:
    return ceil(round(1 / (1 - share), 6))


def durations(run: LoadRun, latency: Latency) -> list[float]:
    """Over all requests that were answered."""
    return [value for answer in run.answers if answer.error is None for value in latency.of(answer)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles that there are, the largest value, and how many there were."""
    found = {name: quantile(values, share) for name, share in QUANTILES.items()}
    known = {name: value for name, value in found.items() if value is not None}
    return known | ({"max": max(values)} if values else {}) | {"num": len(values)}


def figures(run: LoadRun) -> dict[str, Any]:
    """Everything a program may want, seconds and shares. What a server does not say is not there."""
    turn, slo = run.as_turn(), run.header.slo_s
    shared = {measure.key: measure.of(turn, slo) for measure in MEASURES if measure.key in _SHARED}
    known = {key: value for key, value in (shared | packing(run.answers)).items() if value is not None}
    return {latency.key: spread(durations(run, latency)) for latency in LATENCIES} | counts(run) | known


def counts(run: LoadRun) -> dict[str, float]:
    """Of requests. `num_late`: due while no slot was free."""
    waits = [sample.slot_wait_s for sample in run.samples if sample.turn == 0]
    own = [s.answer.sent_s - s.answer.due_s - s.slot_wait_s for s in run.samples]
    num_failed = sum(answer.error is not None for answer in run.answers)
    return {
        "num_planned": run.header.num_planned,
        "num_requests": len(run.samples),
        "num_failed": num_failed,
        "failed_share": num_failed / len(run.samples) if run.samples else 1.0,
        "num_late": sum(wait > 0 for wait in waits),
        "max_slot_wait_s": max(waits, default=0.0),
        "max_send_delay_s": max(own, default=0.0),
    }


def packing(answers: Sequence[Answer]) -> dict[str, float | None]:
    """What servers say of their KV. Shares are of sums, so a long prompt weighs more than a short one."""
    told = [answer for answer in answers if answer.error is None]
    masses = _kv(told, "attention_mass_retained")
    return {
        "shipped_share": _share(_kv_pairs(told, "shipped_bytes", "exact_bytes")),
        "kept_share": _share(_kv_pairs(told, "kept_tokens", "prompt_tokens")),
        "cached_share": _share(
            [
                (answer.num_cached_tokens, answer.num_prompt_tokens)
                for answer in told
                if answer.num_cached_tokens is not None and answer.num_prompt_tokens is not None
            ]
        ),
        "kept_tokens": median(kept) if (kept := _kv(told, "kept_tokens")) else None,
        "mass_retained": median(masses) if masses else None,
        "shipped_bytes": sum(_kv(told, "shipped_bytes")) or None,
        "exact_bytes": sum(_kv(told, "exact_bytes")) or None,
    }


def _kv(answers: Sequence[Answer], name: str) -> list[float]:
    return [answer.kv[name] for answer in answers if answer.kv and answer.kv.get(name) is not None]


def _kv_pairs(answers: Sequence[Answer], part: str, whole: str) -> list[tuple[float, float]]:
    return list(zip(_kv(answers, part), _kv(answers, whole), strict=True))


def _share(pairs: Sequence[tuple[float, float]]) -> float | None:
    total = sum(whole for _, whole in pairs)
    return sum(part for part, _ in pairs) / total if total else None
