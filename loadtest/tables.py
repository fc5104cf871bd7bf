"""The tables of one run, and of two side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from loadtest.results import LoadRun
from loadtest.summary import LATENCIES, QUANTILES, Latency, durations, figures, quantile
from packlight.bench.serve.figures import errors
from packlight.bench.serve.tables import show
from packlight.report.tables import ABSENT, Table

_SEEN = (*QUANTILES, "max")
# Figure, how it is called, and what takes it to that unit.
_REQUESTS = (
    ("num_planned", "planned", 1),
    ("num_requests", "sent", 1),
    ("num_failed", "failed", 1),
    ("failed_share", "failed, %", 100),
    ("slo_share", "within SLO, %", 100),
    ("goodput_per_s", "goodput, req/s", 1),
    ("output_tokens_per_s", "output, tok/s", 1),
    ("num_late", "due while no slot was free", 1),
    ("max_slot_wait_s", "longest wait for a slot, s", 1),
    ("max_send_delay_s", "latest sending otherwise, ms", 1000),
)
_PACKING = (
    ("shipped_share", "KV bytes shipped, % of exact", 100),
    ("shipped_bytes", "KV shipped, MB", 1e-6),
    ("exact_bytes", "KV exact, MB", 1e-6),
    ("kept_share", "tokens kept per KV head, %", 100),
    ("kept_tokens", "tokens kept per KV head, median", 1),
    ("mass_retained", "attention mass retained, %, median", 100),
    ("cached_share", "prompt tokens found in a cache, %", 100),
    ("found_share", "right answers, %", 100),
)


def tables(run: LoadRun) -> list[Table]:
    found = figures(run)
    return [
        latency_table(run),
        _values("Requests", _REQUESTS, found),
        _values("Packing and caches", _PACKING, found),
    ] + [table for table in [error_table(run)] if table.rows]


def latency_table(run: LoadRun) -> Table:
    rows = [(f"{latency.title}, {latency.unit}", *_spread(run, latency)) for latency in LATENCIES]
    note = "from when a request was due, unless it says from sending; a percentile needs 2, 10 and 100 samples"
    return Table("Latency", note, ("what", *_SEEN, "samples"), tuple(rows))


def _spread(run: LoadRun, latency: Latency) -> list[str]:
    values = [latency.scale * value for value in durations(run, latency)]
    cells = [_or_absent(quantile(values, share)) for share in QUANTILES.values()]
    return [*cells, _or_absent(max(values, default=None)), str(len(values))]


def _values(title: str, names: Sequence[tuple[str, str, float]], found: dict[str, float]) -> Table:
    rows = [(text, _or_absent(_scaled(found.get(key), scale))) for key, text, scale in names]
    return Table(title, "over the whole run; what the server does not say is '-'", ("what", "value"), tuple(rows))


def error_table(run: LoadRun) -> Table:
    total = len(run.samples)
    found = Counter(errors([run.as_turn()])).most_common()
    rows = tuple((message, f"{count} of {total}") for message, count in found)
    return Table("Failures", "requests that got no whole answer", ("why", "how many"), rows)


def comparison(first: LoadRun, second: LoadRun, names: tuple[str, str]) -> list[Table]:
    """Figures side by side, and how many times the first one's the second one's are."""
    one, other = figures(first), figures(second)
    latencies = [
        (f"{each.title} {name}, {each.unit}", *_pair(one[each.key].get(name), other[each.key].get(name), each.scale))
        for each in LATENCIES
        for name in _SEEN
    ]
    others = [(text, *_pair(one.get(key), other.get(key), scale)) for key, text, scale in (*_REQUESTS, *_PACKING)]
    columns = ("what", *names, f"{names[1]} / {names[0]}")
    note = "from when a request was due, unless it says from sending"
    return [
        Table("Latency", note, columns, _with_any(latencies)),
        Table("Requests, packing and caches", "over the whole run", columns, _with_any(others)),
        *[
            replace(table, title=f"Failures of {name}")
            for name, run in zip(names, (first, second), strict=True)
            if (table := error_table(run)).rows
        ],
    ]


def _pair(first: float | None, second: float | None, scale: float) -> tuple[str, str, str]:
    ratio = second / first if first and second is not None else None
    return _or_absent(_scaled(first, scale)), _or_absent(_scaled(second, scale)), _or_absent(ratio)


def _with_any(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    return tuple(row for row in rows if any(cell != ABSENT for cell in row[1:]))


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _or_absent(value: float | None) -> str:
    return ABSENT if value is None else show(value)
