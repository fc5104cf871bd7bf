"""The tables of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from packlight.bench.serve.figures import COMPARED, MEASURES, Measure, errors, good, ratio, spread
from packlight.bench.serve.results import Cell, Run, Turn
from packlight.bench.timing import Spread
from packlight.report.tables import ABSENT, Table


def tables(run: Run) -> list[Table]:
    """For each cell the figures, the ratios and what servers said of their work; then all failures."""
    made = [make(run, cell) for cell in run.cells() for make in (figure_table, ratio_table, work_table)]
    return [table for table in [*made, error_table(run)] if table.rows]


def figure_table(run: Run, cell: Cell) -> Table:
    """Servers whose every request failed have no column here: they have no figures."""
    by_server, slo = _answering(run, cell), run.header.slo_s
    cells = {
        _head(measure): [_show(spread(turns, measure, slo), measure.scale) for turns in by_server.values()]
        for measure in MEASURES
    }
    counts = ("requests", *(str(sum(len(turn.answers) for turn in turns)) for turns in by_server.values()))
    failures = ("failed", *(str(len(errors(turns))) for turns in by_server.values()))
    note = f"medians over {_num_rounds(run, cell)} rounds, smallest and largest in brackets"
    rows = (*_used(cells), counts, failures) if by_server else ()
    return Table(cell.label, note, ("measure", *by_server), rows)


def ratio_table(run: Run, cell: Cell) -> Table:
    by_server, slo = _answering(run, cell), run.header.slo_s
    base_name = run.header.servers[0].name
    base = by_server.pop(base_name, [])
    cells = {
        measure.title: [_show(ratio(turns, base, measure, slo)) for turns in by_server.values()] for measure in COMPARED
    }
    note = "taken within each round, then the median, smallest and largest in brackets"
    return Table(f"{cell.label}: ratios to {base_name}", note, ("measure", *by_server), _used(cells))


def work_table(run: Run, cell: Cell) -> Table:
    """Medians over answers. Prompts that a server counts otherwise than asked for were not the same work."""
    by_server = _answering(run, cell)
    lines: dict[str, Callable[[Sequence[Turn]], str]] = {
        "prompt tokens": lambda turns: _median(turns, lambda answer: answer.num_prompt_tokens),
        "cached tokens": lambda turns: _median(turns, lambda answer: answer.num_cached_tokens),
        "output tokens": lambda turns: _median(turns, lambda answer: answer.num_output_tokens),
        "tokens counted by": _counted_by,
        "tokens per event": lambda turns: _median(turns, lambda answer: answer.tokens_per_event),
        "recipe": _recipe,
        "tokens kept": lambda turns: _median(turns, lambda answer: (answer.kv or {}).get("kept_tokens")),
        "MB shipped": lambda turns: _median(turns, lambda answer: _megabytes(answer.kv, "shipped_bytes")),
        "MB exact": lambda turns: _median(turns, lambda answer: _megabytes(answer.kv, "exact_bytes")),
    }
    cells = {name: [of(turns) for turns in by_server.values()] for name, of in lines.items()}
    return Table(f"{cell.label}: the work done", "medians over answers", ("what", *by_server), _used(cells))


def error_table(run: Run) -> Table:
    rows = [
        (name, cell.label, f"{count} of {sum(len(turn.answers) for turn in turns)}", message)
        for cell in run.cells()
        for name, turns in run.by_server(cell).items()
        for message, count in Counter(errors(turns)).most_common()
    ]
    return Table("Failures", "requests that got no complete answer", ("server", "cell", "how many", "why"), tuple(rows))


def failed_cells(run: Run) -> list[str]:
    """Where a server answered nothing at all."""
    return [
        f"{name}: every request failed at {cell.label}"
        for cell in run.cells()
        for name, turns in run.by_server(cell).items()
        if not any(map(good, turns))
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """The head of a report, as (name, value)."""
    header, machine = run.header, run.header.machine
    servers = [f"{server.name}: {server.model} at {server.url}{_told(server.body)}" for server in header.servers]
    named = [
        ("workload", f"{header.workload}, at most {header.max_tokens} tokens out, {header.api} API"),
        ("servers", "; ".join(servers)),
        ("tokenizer", header.tokenizer),
        ("prompts", "computed before the clock starts (prefix caches hold them)" if header.prefill_first else ""),
        ("SLO", ", ".join(f"{name} <= {limit:g} s" for name, limit in header.slo_s.items())),
        ("seed", str(header.seed)),
        ("command", header.command),
        ("machine", ", ".join(f"{name} {_plain(value)}" for name, value in machine.items() if value is not None)),
    ]
    return [(name, value) for name, value in named if value]


def show(value: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _answering(run: Run, cell: Cell) -> dict[str, Sequence[Turn]]:
    return {name: turns for name, turns in run.by_server(cell).items() if any(map(good, turns))}


def _used(cells: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The rows in which anybody has something."""
    return tuple((name, *row) for name, row in cells.items() if any(cell != ABSENT for cell in row))


def _show(found: Spread | None, scale: float = 1.0) -> str:
    if found is None:
        return ABSENT
    scaled = found.times(scale)
    if len(scaled.values) == 1:
        return show(scaled.median)
    return f"{show(scaled.median)} ({show(min(scaled.values))} - {show(max(scaled.values))})"


def _head(measure: Measure) -> str:
    return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def _num_rounds(run: Run, cell: Cell) -> int:
    return len({turn.round for turns in run.by_server(cell).values() for turn in turns})


def _median(turns: Sequence[Turn], of: Callable[..., float | None]) -> str:
    values = [value for turn in turns for answer in good(turn) if (value := of(answer)) is not None]
    return show(median(values)) if values else ABSENT


def _counted_by(turns: Sequence[Turn]) -> str:
    return ", ".join(dict.fromkeys(answer.counted_by for turn in turns for answer in good(turn)))


def _recipe(turns: Sequence[Turn]) -> str:
    recipes = [answer.kv["recipe"] for turn in turns for answer in good(turn) if answer.kv and "recipe" in answer.kv]
    return ", ".join(dict.fromkeys(recipes)) or ABSENT


def _megabytes(kv: dict[str, float] | None, name: str) -> float | None:
    return None if kv is None or kv.get(name) is None else kv[name] / 1e6


def _told(body: dict[str, object]) -> str:
    return f" with {_plain(body)}" if body else ""


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
