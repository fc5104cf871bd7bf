"""The plots of one run, or of several over each other: latency and packing side by side, load and server below.

Knows time bins. A request belongs to the moment at which it was due. Geometry is `packlight.report.charts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median

from loadtest.results import LoadRun, Scrape
from loadtest.scrape import WATCHED
from loadtest.summary import packing
from packlight.bench.serve.answers import Answer
from packlight.bench.serve.plots import sections as distributions
from packlight.bench.serve.results import Header, Run, Server
from packlight.bench.serve.tables import show
from packlight.report.charts import Axis, Chart, Curve, Value, linear_axis, plot
from packlight.report.page import Section

NUM_BINS = 24
_HUES = 8  # of the page; the next 8 styles are the same hues, dashed
Runs = Mapping[str, LoadRun]
OfBin = Callable[[Sequence[Answer]], float | None]


@dataclass(frozen=True, slots=True)
class Plotted:
    """One plot: for each curve, what a bin's answers come to."""

    title: str
    curves: Mapping[str, OfBin]


def sections(runs: Runs) -> list[Section]:
    """Those that have anything to show."""
    span_s = max(run.header.duration_s for run in runs.values())
    of_bins = f"Requests by when they were due, in {NUM_BINS} parts of the run."
    made = [
        Section("Latency and packing", of_bins, tuple(_over_time(runs, each, span_s) for each in _SIDE_BY_SIDE)),
        Section("Load", of_bins, (*(_over_time(runs, each, span_s) for each in _LOAD), _in_flight(runs))),
        Section("The server's own metrics", "Sampled from its Prometheus pages.", _server_charts(runs)),
        *_distributions(runs),
    ]
    with_lines = [replace(each, charts=tuple(chart for chart in each.charts if chart.lines)) for each in made]
    return [each for each in with_lines if each.charts]


def _each(of: Callable[[Answer], float | None], reduce: Callable[[Sequence[float]], float], scale: float) -> OfBin:
    def value(answers: Sequence[Answer]) -> float | None:
        found = [each for answer in answers if (each := of(answer)) is not None]
        return scale * reduce(found) if found else None

    return value


def _typical(of: Callable[[Answer], float | None], scale: float) -> dict[str, OfBin]:
    """A bin has too few answers for a tail: its slowest one is a fact, a percentile would be none."""
    return {"median": _each(of, median, scale), "slowest": _each(of, max, scale)}


def _packed(name: str, scale: float = 100.0) -> OfBin:
    return lambda answers: None if (value := packing(answers)[name]) is None else scale * value


# The page has two columns: what users wait stands left, what packing does right.
_SIDE_BY_SIDE = (
    Plotted("TTFT, ms", _typical(lambda answer: answer.ttft_s, 1e3)),
    Plotted("KV bytes shipped, % of exact", {"shipped": _packed("shipped_share")}),
    Plotted("TPOT, ms", _typical(lambda answer: answer.tpot_s, 1e3)),
    Plotted("prompt tokens found in a cache, %", {"cached": _packed("cached_share")}),
    Plotted("E2E, s", _typical(lambda answer: answer.e2e_s, 1.0)),
    Plotted("tokens kept per KV head", {"median": _packed("kept_tokens", 1.0)}),
)
_LOAD = (
    Plotted("requests", {"due": len, "failed": lambda answers: sum(answer.error is not None for answer in answers)}),
)


def _over_time(runs: Runs, plotted: Plotted, span_s: float) -> Chart:
    curves = []
    for index, (name, run) in enumerate(runs.items()):
        bins = _bins(run.answers, span_s)
        for number, (label, of) in enumerate(plotted.curves.items()):
            found = [(at_s, value) for at_s, answers in bins.items() if (value := of(answers)) is not None]
            told = f"{name} {label}".strip()
            values = [Value(at_s, value, f"{told}, {at_s:.0f} s: {show(value)}") for at_s, value in found]
            curves.append(Curve(told, _style(index, number), values))
    return plot(plotted.title, "seconds into the run", curves, from_zero, from_zero)


def from_zero(values: Sequence[float], start: float, end: float) -> Axis:
    """Up to 1 where everything is zero: an empty queue is worth a plot, but not one that is scaled to nothing."""
    return linear_axis(values if any(values) else [1.0], start, end)


def _style(run: int, curve: int) -> int:
    return run + _HUES * curve


def _bins(answers: Sequence[Answer], span_s: float) -> dict[float, list[Answer]]:
    """Answers by the middle of their bin. Later turns of conversations may be due after the last arrival."""
    width = max([span_s, *(answer.due_s for answer in answers)]) / NUM_BINS * (1 + 1e-9)
    found: dict[float, list[Answer]] = {(index + 0.5) * width: [] for index in range(NUM_BINS)}
    middles = list(found)
    for answer in answers:
        found[middles[int(answer.due_s / width)]].append(answer)
    return {at_s: inside for at_s, inside in found.items() if inside}


def _in_flight(runs: Runs) -> Chart:
    """Requests sent and unanswered, at so many even moments. A failed one counts as over at once."""
    curves = []
    for index, (name, run) in enumerate(runs.items()):
        spans = [(a.sent_s, a.last_s if a.last_s is not None else a.sent_s) for a in run.answers]
        last_s = max((end for _, end in spans), default=0.0)
        moments = [last_s * step / (2 * NUM_BINS) for step in range(2 * NUM_BINS + 1)]
        counts = [(at, sum(start <= at < end for start, end in spans)) for at in moments]
        values = [Value(at, count, f"{name} {at:.0f} s: {count}".strip()) for at, count in counts]
        curves.append(Curve(name or "in flight", index, values))
    return plot("requests in flight", "seconds into the run", curves, from_zero, from_zero)


def _server_charts(runs: Runs) -> tuple[Chart, ...]:
    gauges = [(watched.key, watched.title) for watched in WATCHED if not watched.is_counter]
    charts = [_server_chart(runs, title, partial(_gauge, key=key)) for key, title in gauges]
    return (
        *charts,
        _server_chart(runs, "output tokens per s", partial(_rate, key="output_tokens")),
        _server_chart(
            runs, "KV shipped so far, % of exact", partial(_ratio, part="shipped_bytes", whole="exact_bytes")
        ),
        _server_chart(
            runs, "cached so far, % of prompt tokens", partial(_ratio, part="cached_tokens", whole="prompt_tokens")
        ),
    )


def _server_chart(runs: Runs, title: str, of: Callable[[Sequence[Scrape]], list[tuple[float, float]]]) -> Chart:
    curves = []
    for index, (name, run) in enumerate(runs.items()):
        during = thinned([scrape for scrape in run.scrapes if scrape.at_s >= 0])
        values = [Value(at, value, f"{name} {at:.0f} s: {show(value)}".strip()) for at, value in of(during)]
        curves.append(Curve(name or title, index, values))
    return plot(title, "seconds into the run", curves, from_zero, from_zero)


def thinned(scrapes: Sequence[Scrape]) -> Sequence[Scrape]:
    """Not more than can be told apart in a plot."""
    return scrapes[:: max(1, len(scrapes) // (2 * NUM_BINS))]


def _gauge(scrapes: Sequence[Scrape], key: str) -> list[tuple[float, float]]:
    return [(scrape.at_s, scrape.values[key]) for scrape in scrapes if key in scrape.values]


def _rate(scrapes: Sequence[Scrape], key: str) -> list[tuple[float, float]]:
    return [
        (after.at_s, _grown(before, after, key) / (after.at_s - before.at_s))
        for before, after in pairwise(each for each in scrapes if key in each.values)
    ]


def _ratio(scrapes: Sequence[Scrape], part: str, whole: str) -> list[tuple[float, float]]:
    """In percent, of what was added since the first scrape. Between two scrapes it would say little: a request's two
    numbers are not counted at the same moment."""
    known = [each for each in scrapes if part in each.values and whole in each.values]
    return [
        (each.at_s, 100 * _grown(known[0], each, part) / _grown(known[0], each, whole))
        for each in known
        if _grown(known[0], each, whole) > 0
    ]


def _grown(before: Scrape, after: Scrape, key: str) -> float:
    """A restarted process counts from zero again."""
    return max(0.0, after.values[key] - before.values[key])


def _distributions(runs: Runs) -> list[Section]:
    """Those of `packlight bench serve`."""
    header = Header(
        command="",
        workload="",
        api="chat",
        tokenizer="",
        seed=0,
        max_tokens=0,
        prefill_first=False,
        servers=tuple(Server(name=name or "all", url="", model="") for name in runs),
        machine={},
    )
    turns = tuple(replace(run.as_turn(name or "all"), load="") for name, run in runs.items())
    return [replace(each, title="Distributions") for each in distributions(Run(header=header, turns=turns))]
