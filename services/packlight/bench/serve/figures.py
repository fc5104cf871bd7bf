"""What a run's turns say: one figure per turn and measure, then spreads over rounds and ratios within them.

Knows answers and arithmetic. A turn's figure for something that each answer has is the median over its answers, so
that rounds weigh alike; a ratio is taken between two servers' figures of the same round, where both had the same
neighbours on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.results import Run, Turn
from packlight.bench.timing import Spread, percentile

Slo = Mapping[str, float]
OfTurn = Callable[[Turn, Slo], float | None]
SLO_NAMES = ("ttft", "tpot", "e2e")
_TAIL = 0.99


@dataclass(frozen=True, slots=True)
class Measure:
    """`of` is None for turns that do not have it. `scale` takes the figure to `unit`."""

    key: str
    title: str
    unit: str
    of: OfTurn
    scale: float = 1.0


class Decoding(NamedTuple):
    """The time during which all requests of a turn were decoding, and the tokens that came meanwhile."""

    seconds: float
    num_tokens: float


def good(turn: Turn) -> list[Answer]:
    """The answers that are answers."""
    return [answer for answer in turn.answers if answer.error is None]


def decoding(turn: Turn) -> Decoding | None:
    """Over all moments at which as many answers as may run at once were between their first and last token.

    None if there was no such moment, as when early answers end before late ones begin, and under open load."""
    spans = [
        (answer.first_s, answer.last_s)
        for answer in good(turn)
        if answer.first_s is not None and answer.last_s is not None
    ]
    full = _overlaps(spans, turn.concurrency)
    if not full:
        return None
    seconds = sum(end - start for start, end in full)
    return Decoding(seconds, sum(_tokens_within(answer, full) for answer in good(turn)))


def _overlaps(spans: Iterable[tuple[float, float]], num_at_once: int | None) -> list[tuple[float, float]]:
    """The stretches of time that `num_at_once` of the spans cover together."""
    edges = sorted([edge for start, end in spans for edge in ((start, 1), (end, -1))])
    full: list[tuple[float, float]] = []
    num_open = 0
    for (at, step), (until, _) in pairwise(edges):
        num_open += step
        if num_open == num_at_once and until > at:
            full.append((at, until))
    return full


def _tokens_within(answer: Answer, stretches: Sequence[tuple[float, float]]) -> float:
    """Each event stands for an equal share of the tokens after the first. Where tokens outnumber events, some have no
    text; those at the end came with it, so it counts as an event."""
    has_silent = answer.last_s is not None and answer.num_output_tokens > len(answer.event_s)
    later = [*answer.event_s[1:], answer.last_s or 0.0] if has_silent else answer.event_s[1:]
    num_events = sum(1 for at in later if any(start < at <= end for start, end in stretches))
    return num_events * (answer.num_output_tokens - 1) / len(later) if later else 0.0


def _each(of: Callable[[Answer], float | None], keep: Callable[[Answer], bool] = lambda answer: True) -> OfTurn:
    """The median over the answers that have it."""

    def figure(turn: Turn, slo: Slo) -> float | None:
        values = [value for answer in good(turn) if keep(answer) and (value := of(answer)) is not None]
        return median(values) if values else None

    return figure


def _gap_tail(turn: Turn, slo: Slo) -> float | None:
    gaps = [gap for answer in good(turn) for gap in answer.gaps_s]
    return percentile(gaps, _TAIL) if gaps else None


def span_s(turn: Turn) -> float | None:
    """From when the first request was due to the last token of all."""
    ends = [answer.last_s for answer in good(turn) if answer.last_s is not None]
    return max(ends) - min(answer.due_s for answer in turn.answers) if ends else None


def _output_rate(turn: Turn, slo: Slo) -> float | None:
    span = span_s(turn)
    return sum(answer.num_output_tokens for answer in good(turn)) / span if span else None


def _decode_rate(turn: Turn, slo: Slo) -> float | None:
    found = decoding(turn)
    return found.num_tokens / found.seconds if found and found.num_tokens else None


def _decode_seconds(turn: Turn, slo: Slo) -> float | None:
    found = decoding(turn)
    return found.seconds if found else None


def _meets(answer: Answer, slo: Slo) -> bool:
    durations = {"ttft": answer.ttft_s, "tpot": answer.tpot_s, "e2e": answer.e2e_s}
    return all((durations[name] or 0.0) <= limit for name, limit in slo.items())


def _goodput(turn: Turn, slo: Slo) -> float | None:
    span = span_s(turn)
    return sum(_meets(answer, slo) for answer in good(turn)) / span if slo and span else None


def _share_met(turn: Turn, slo: Slo) -> float | None:
    """Of all requests: one that failed has not met it."""
    return sum(_meets(answer, slo) for answer in good(turn)) / len(turn.answers) if slo and turn.answers else None


def _share_found(turn: Turn, slo: Slo) -> float | None:
    asked = [answer.found for answer in turn.answers if answer.found is not None]
    return sum(asked) / len(asked) if asked else None


def _kv_sum(name: str) -> Callable[[Answer], float | None]:
    return lambda answer: answer.kv.get(name) if answer.kv else None


def _shipped_share(answer: Answer) -> float | None:
    shipped, exact = _kv_sum("shipped_bytes")(answer), _kv_sum("exact_bytes")(answer)
    return shipped / exact if shipped is not None and exact else None


MEASURES = (
    Measure("ttft_s", "TTFT", "ms", _each(lambda a: a.ttft_s, lambda a: not a.is_follow_up), 1e3),
    Measure("follow_up_ttft_s", "TTFT, follow-up", "ms", _each(lambda a: a.ttft_s, lambda a: a.is_follow_up), 1e3),
    Measure("tpot_s", "TPOT", "ms", _each(lambda a: a.tpot_s), 1e3),
    Measure("itl_p99_s", "ITL p99", "ms", _gap_tail, 1e3),
    Measure("e2e_s", "E2E", "s", _each(lambda a: a.e2e_s)),
    Measure("span_s", "all done", "s", lambda turn, slo: span_s(turn)),
    Measure("output_tokens_per_s", "output", "tok/s", _output_rate),
    Measure("decode_tokens_per_s", "output, all decoding", "tok/s", _decode_rate),
    Measure("decode_window_s", "of that", "s", _decode_seconds),
    Measure("goodput_per_s", "goodput", "req/s", _goodput),
    Measure("slo_share", "in SLO", "%", _share_met, 100),
    Measure("found_share", "found", "%", _share_found, 100),
    Measure("shipped_share", "KV shipped", "%", _each(_shipped_share), 100),
    Measure("peak", "gauge peak", "", lambda turn, slo: turn.peak),
)
# Ratios of these say who is ahead; those of the others say little.
COMPARED = tuple(measure for measure in MEASURES if measure.key not in ("decode_window_s", "slo_share", "found_share"))


def spread(turns: Sequence[Turn], measure: Measure, slo: Slo) -> Spread | None:
    """The measure over the rounds that have it."""
    values = [value for turn in turns if (value := measure.of(turn, slo)) is not None]
    return Spread(tuple(values)) if values else None


def ratio(turns: Sequence[Turn], base: Sequence[Turn], measure: Measure, slo: Slo) -> Spread | None:
    """Against `base`, over the rounds in which both have the measure."""
    theirs = {turn.round: measure.of(turn, slo) for turn in base}
    pairs = [(measure.of(turn, slo), theirs.get(turn.round)) for turn in turns]
    ratios = [mine / other for mine, other in pairs if mine is not None and other]
    return Spread(tuple(ratios)) if ratios else None


def figures(run: Run) -> dict[str, Any]:
    """All spreads and ratios, by cell, server and measure, for programs to read."""
    found: dict[str, Any] = {}
    for cell in run.cells():
        by_server = run.by_server(cell)
        base = by_server.get(run.header.servers[0].name, ())
        found[cell.label] = {
            name: {
                measure.key: {**of.as_json(), **_ratio_json(ratio(turns, base, measure, run.header.slo_s))}
                for measure in MEASURES
                if (of := spread(turns, measure, run.header.slo_s)) is not None
            }
            | {"requests": sum(len(turn.answers) for turn in turns), "failed": len(errors(turns))}
            for name, turns in by_server.items()
        }
    return found


def errors(turns: Sequence[Turn]) -> list[str]:
    return [answer.error for turn in turns for answer in turn.answers if answer.error is not None]


def _ratio_json(against: Spread | None) -> dict[str, Any]:
    return {} if against is None else {"ratio": against.as_json()}
