"""The plots of an evaluation: which measure is drawn against which share of bytes, and the needle heat maps.

Knows what axes mean. Geometry is `packlight.report.charts`'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import NamedTuple

from packlight.evaluate.report.summary import Asked, Mean, Measure, Setting, by_asked, means, merge_cells, settings_of
from packlight.evaluate.report.tables import percent, times
from packlight.evaluate.results import Cell, Point
from packlight.report.charts import Chart, Curve, Scale, Tick, Value, between, log_axis, plot


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Needle scores at one factor: a row of squares per depth, a column per length."""

    title: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    squares: tuple[Square, ...]


class Square(NamedTuple):
    """`shade` is the score in tenths."""

    column: int
    row: int
    shade: int
    text: str


class Axis(NamedTuple):
    """Which share of bytes a chart is drawn over."""

    title: str
    share: Callable[[Mean], float]


KEPT = Axis("KV bytes kept, share of exact", lambda mean: mean.kept_share)
READ = Axis("KV bytes read per decode step, share of exact", lambda mean: mean.read_share)


def chart(points: Sequence[Point], measure: Measure, axis: Axis, name: Callable[[Setting], str]) -> Chart:
    """The measure against a share of bytes, one line per setting. `points` includes some that took the measure.

    A setting's style is its place among the settings of `points`, so it looks the same in all plots of the same points.
    The share falls from left to right: further right is packed harder.
    """
    curves: defaultdict[Setting, list[Value]] = defaultdict(list)
    for asked, mean in means(points, measure).items():
        curves[asked.setting].append(Value(axis.share(mean), mean.value, _tell(asked, mean, measure)))
    style = {setting: index for index, setting in enumerate(settings_of(points))}
    return plot(
        measure.title,
        axis.title,
        [Curve(name(setting), style[setting], values) for setting, values in curves.items()],
        _share_axis,
        log_axis if measure.is_log else _tenths_axis,
    )


def heat_maps(points: Sequence[Point]) -> dict[str, list[HeatMap]]:
    """The maps of each setting that has needle cells, by its label: one for each factor."""
    found: defaultdict[str, list[HeatMap]] = defaultdict(list)
    for asked, group in by_asked(points).items():
        if cells := merge_cells(group):
            found[asked.setting.label].append(_heat_map(asked, cells))
    return dict(found)


def _heat_map(asked: Asked, cells: Sequence[Cell]) -> HeatMap:
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    squares = [
        Square(
            lengths.index(cell.length),
            depths.index(cell.depth),
            round(10 * cell.score),
            f"{cell.length} tokens, depth {cell.depth:.0%}: {cell.score:.2f} ({cell.num_samples} samples)",
        )
        for cell in cells
    ]
    return HeatMap(times(asked.factor), tuple(lengths), tuple(depths), tuple(squares))


def _tell(asked: Asked, mean: Mean, measure: Measure) -> str:
    return (
        f"{asked.setting.label} {times(asked.factor)}: {measure.show(mean.value)}; "
        f"{percent(mean.kept_share)} of the bytes kept, {percent(mean.read_share)} read; {mean.num_samples} samples"
    )


def _share_axis(shares: Sequence[float], start: float, end: float) -> tuple[Scale, list[Tick]]:
    """Halvings, from the largest share to the smallest."""
    logs = [log2(share) for share in shares if share > 0]
    # A share a few per cent beyond a halving (padding, scales) is drawn just outside rather than opening another one.
    high, low = ceil(round(max(logs, default=0), 1)), floor(round(min(logs, default=-1), 1))
    low = min(low, high - 1)

    def at(share: float) -> float:
        halvings = log2(share) if share > 0 else low
        return between(start, end, (high - halvings) / (high - low))

    return at, [Tick(at(2.0**power), percent(2.0**power)) for power in range(high, low - 1, -1)]


def _tenths_axis(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[Tick]]:
    """Up to 1, from the tenth below the smallest value, at least two."""
    low = min(floor(round(10 * min(values, default=0), 6)), 8)

    def at(value: float) -> float:
        return between(start, end, (10 * value - low) / (10 - low))

    step = 1 if low >= 5 else 2
    return at, [Tick(at(tenth / 10), f"{tenth / 10:g}") for tenth in range(10, low - 1, -step)]
