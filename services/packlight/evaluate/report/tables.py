"""The tables of an evaluation's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from packlight.evaluate.report.summary import (
    MEASURES,
    Asked,
    Mean,
    Measure,
    by_asked,
    factors_of,
    mean,
    means,
    settings_of,
    tasks_of,
)
from packlight.evaluate.results import Header, Point, Results
from packlight.report.tables import ABSENT, Table


def summary_tables(results: Results) -> list[Table]:
    """Needle score, KL and top-1 agreement: a row per setting, a column per factor; empty ones are left out."""
    tables = [_measure_table(results.points, measure) for measure in MEASURES]
    return [table for table in tables if table.rows]


def detail_tables(results: Results) -> list[Table]:
    """What each setting and factor cost, and what it scored on each task."""
    return [table for table in (_cost_table(results.points), _task_table(results.points)) if table.rows]


def facts(header: Header) -> list[tuple[str, str]]:
    """The header in words, as (name, value)."""
    named = [
        ("model", f"{header.model} ({header.dtype})"),
        ("machine", header.machine),
        ("date", header.started_at.strftime("%Y-%m-%d %H:%M %Z")),
        ("command", header.command),
        ("seed", str(header.seed)),
        ("protocol", header.protocol),
        ("versions", ", ".join(f"{name} {version}" for name, version in header.versions.items())),
        ("time", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in header.durations_s.items())),
    ]
    return [(name, value) for name, value in named if value]


def _measure_table(points: Sequence[Point], measure: Measure) -> Table:
    taken = means(points, measure)
    factors = [factor for factor in factors_of(points) if any(asked.factor == factor for asked in taken)]
    rows = []
    for setting in settings_of(points):
        cells = [_show(taken.get(Asked(setting, factor)), measure) for factor in factors]
        if any(cell != ABSENT for cell in cells):
            rows.append((setting.label, *cells))
    return Table(measure.title, _note(measure, taken), ("recipe", *map(times, factors)), tuple(rows))


def _note(measure: Measure, taken: Mapping[Asked, Mean]) -> str:
    counts = sorted({mean.num_samples for mean in taken.values()})
    samples = "" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{measure.better}; {samples} samples each"


def _cost_table(points: Sequence[Point]) -> Table:
    columns: Mapping[str, tuple[Callable[[Point], float | None], Callable[[float], str]]] = {
        "tokens kept": (lambda point: point.num_kept_tokens, "{:.0f}".format),
        "bytes kept": (lambda point: point.kept_share, percent),
        "bytes read": (lambda point: point.read_share, percent),
        "mass kept": (lambda point: point.retained_mass, "{:.3f}".format),
        "attention error": (lambda point: point.attention_error, "{:.3f}".format),
        "KL p95": (lambda point: point.kl_p95, "{:.3g}".format),
        "selection": (lambda point: point.select_share, percent),
    }
    rows = []
    for asked, group in by_asked(points).items():
        cells = [_or_absent(mean(group, of), show) for of, show in columns.values()]
        rows.append((asked.setting.label, times(asked.factor), *cells))
    note = "bytes are shares of the exact KV's, read ones per decode step; selection is a share of prefill time"
    return Table("What was kept", note, ("recipe", "asked", *columns), tuple(rows))


def _task_table(points: Sequence[Point]) -> Table:
    tasks = tasks_of(points)
    rows = []
    for asked, group in by_asked(points).items():
        scores = {
            task: mean([point for point in group if point.task == task], lambda point: point.score) for task in tasks
        }
        if any(score is not None for score in scores.values()):
            cells = [_or_absent(score, "{:.2f}".format) for score in scores.values()]
            rows.append((asked.setting.label, times(asked.factor), *cells))
    return Table("Task scores", "share of the references in the answer", ("recipe", "asked", *tasks), tuple(rows))


def _show(mean: Mean | None, measure: Measure) -> str:
    return _or_absent(None if mean is None else mean.value, measure.show)


def _or_absent(value: float | None, show: Callable[[float], str]) -> str:
    return ABSENT if value is None else show(value)


def percent(share: float) -> str:
    """With three significant digits."""
    return f"{100 * share:.3g} %"


def times(factor: float) -> str:
    """`8x`."""
    return f"{factor:g}x"
