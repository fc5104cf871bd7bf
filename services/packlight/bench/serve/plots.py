"""The plots of a run: what a longer prompt costs, and how latencies are distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.figures import MEASURES, Measure, good, spread
from packlight.bench.serve.results import Cell, Run, Turn
from packlight.bench.serve.tables import show
from packlight.bench.timing import percentile
from packlight.report.charts import Chart, Curve, Value, linear_axis, log_axis, plot
from packlight.report.page import Section

_AGAINST_LENGTH = ("tpot_s", "decode_tokens_per_s", "ttft_s")
_QUANTILES = tuple(step / 20 for step in range(21))
Latencies = Callable[[Answer], Sequence[float]]
_LATENCIES: tuple[tuple[str, Latencies], ...] = (
    ("TTFT", lambda answer: [] if answer.ttft_s is None else [answer.ttft_s]),
    ("TPOT", lambda answer: [] if answer.tpot_s is None else [answer.tpot_s]),
    ("ITL", lambda answer: answer.gaps_s),
)


def sections(run: Run) -> list[Section]:
    lengths = _length_charts(run)
    by_length = [Section("Against the prompt's length", "One dot for each length, the median over rounds.", lengths)]
    note = "The share of answers (of gaps, for ITL) that took no longer; one dot for every twentieth."
    distributions = [Section(cell.label, note, _distributions(run, cell)) for cell in run.cells()]
    return [section for section in [*by_length, *distributions] if section.charts]


def _length_charts(run: Run) -> tuple[Chart, ...]:
    """For each load that was run at several lengths."""
    loads = dict.fromkeys(cell.load for cell in run.cells())
    several = [load for load in loads if len({cell.prompt_tokens for cell in run.cells() if cell.load == load}) > 1]
    measures = [measure for key in _AGAINST_LENGTH for measure in MEASURES if measure.key == key]
    charts = [_length_chart(run, load, measure) for load in several for measure in measures]
    return tuple(chart for chart in charts if chart.lines)


def _length_chart(run: Run, load: str, measure: Measure) -> Chart:
    cells = [cell for cell in run.cells() if cell.load == load]
    curves = [
        Curve(server.name, style, [value for cell in cells if (value := _value(run, cell, server.name, measure))])
        for style, server in enumerate(run.header.servers)
    ]
    title = f"{measure.title}, {measure.unit} ({load})"
    return plot(title, "prompt tokens", curves, linear_axis, linear_axis)


def _value(run: Run, cell: Cell, server: str, measure: Measure) -> Value | None:
    found = spread(run.by_server(cell).get(server, ()), measure, run.header.slo_s)
    if found is None:
        return None
    scaled = found.times(measure.scale)
    ends = f"{show(min(scaled.values))} to {show(max(scaled.values))}"
    text = f"{server}, {cell.prompt_tokens} tokens: {show(scaled.median)} {measure.unit}, {ends}"
    return Value(cell.prompt_tokens, scaled.median, text)


def _distributions(run: Run, cell: Cell) -> tuple[Chart, ...]:
    charts = [_distribution(run, cell, name, latencies) for name, latencies in _LATENCIES]
    return tuple(chart for chart in charts if chart.lines)


def _distribution(run: Run, cell: Cell, name: str, latencies: Latencies) -> Chart:
    by_server = run.by_server(cell)
    curves = [
        Curve(server.name, style, _quantiles(server.name, by_server.get(server.name, ()), latencies))
        for style, server in enumerate(run.header.servers)
    ]
    return plot(f"{name}, share of all", "ms", curves, log_axis, linear_axis)


def _quantiles(server: str, turns: Sequence[Turn], latencies: Latencies) -> list[Value]:
    """Of all rounds together."""
    values = [value for turn in turns for answer in good(turn) for value in latencies(answer)]
    if not values:
        return []
    found = [(share, 1e3 * percentile(values, share)) for share in _QUANTILES]
    return [Value(value, share, f"{server}: {share:.0%} within {show(value)} ms") for share, value in found]
