"""What people see of a run, or of two: tables on the terminal, one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from loadtest.results import LoadRun
from loadtest.series import sections
from loadtest.tables import comparison, tables
from packlight.report.page import render_page
from packlight.report.tables import to_text


def as_text(run: LoadRun) -> str:
    return "\n".join(map(to_text, tables(run)))


def as_page(run: LoadRun) -> str:
    return render_page(f"Load test: {run.header.scenario}", facts(run), sections({"": run}), tables(run))


def compared_as_text(runs: Mapping[str, LoadRun]) -> str:
    (first, second), names = runs.values(), tuple(runs)
    return "\n".join(map(to_text, comparison(first, second, (names[0], names[1]))))


def compared_as_page(runs: Mapping[str, LoadRun]) -> str:
    (first, second), names = runs.values(), tuple(runs)
    told = _told_once({name: facts(run) for name, run in runs.items()})
    warned = [("beware", line) for line in differences(first, second)]
    made = comparison(first, second, (names[0], names[1]))
    return render_page(f"Load tests: {names[0]} and {names[1]}", [*warned, *told], sections(runs), made)


def _told_once(by_run: Mapping[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Facts that all runs share without a name, the others under the run's."""
    shared = set.intersection(*map(set, by_run.values()))
    common = [fact for fact in next(iter(by_run.values())) if fact in shared]
    own = [
        (f"{run}: {name}", value) for run, told in by_run.items() for name, value in told if (name, value) not in shared
    ]
    return [*common, *own]


def differences(first: LoadRun, second: LoadRun) -> list[str]:
    """Why two runs are not the same load."""
    one, other = first.header, second.header
    found = []
    if one.scenario != other.scenario or one.settings != other.settings:
        found.append(f"the scenarios differ: {one.scenario} and {other.scenario}, or their settings")
    if one.num_planned != other.num_planned:
        found.append(f"the numbers of requests differ: {one.num_planned} and {other.num_planned}")
    if one.tokenizer != other.tokenizer:
        found.append(f"prompts were measured by different tokenizers: {one.tokenizer} and {other.tokenizer}")
    return found


def facts(run: LoadRun) -> list[tuple[str, str]]:
    """The head of a report, as (name, value)."""
    header = run.header
    named = [
        ("server", f"{header.model} at {header.url}, {header.server}"),
        ("requests", ", ".join(f"{name} {value}" for name, value in header.body.items() if name != "model")),
        ("load", "; ".join([str(header.settings.get("about", "")), *header.notes])),
        ("open loop", openness(run)),
        ("SLO", ", ".join(f"{name} <= {limit:g} s" for name, limit in header.slo_s.items())),
        ("tokenizer", header.tokenizer),
        ("seed", str(header.seed)),
        ("command", header.command),
        (
            "machine",
            ", ".join(f"{name} {_plain(value)}" for name, value in header.machine.items() if value is not None),
        ),
    ]
    return [(name, value) for name, value in named if value]


def openness(run: LoadRun) -> str:
    """Whether the load was what it was meant to be."""
    waits = [sample.slot_wait_s for sample in run.samples if sample.turn == 0 and sample.slot_wait_s > 0]
    if not waits:
        return f"all {len(run.samples)} requests had one of {run.header.max_in_flight} slots when they were due"
    return (
        f"{len(waits)} conversations were due while all {run.header.max_in_flight} slots were taken, and waited up to "
        f"{max(waits):.1f} s; latencies count from when they were due. Raise max_in_flight, or lower the load"
    )


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
