"""The plots of a report, as numbers ready to draw: lines in pixels, ticks, labels that do not overlap.

Knows geometry. Colours and SVG are the page template's (`page.html.j2`), which styles series by number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, floor, log2, log10
from operator import attrgetter, itemgetter
from typing import NamedTuple

from packlight.evaluate.report.summary import Asked, Mean, Measure, Setting, by_asked, means, merge_cells, settings_of
from packlight.evaluate.report.tables import percent, times
from packlight.evaluate.results import Cell, Point

WIDTH, HEIGHT = 620, 364
LEFT, RIGHT, TOP, BOTTOM = 58, 470, 14, 316
_LABEL_HEIGHT = 15


class Mark(NamedTuple):
    """A measured value at its pixels; `text` is its tooltip."""

    x: float
    y: float
    text: str


class Tick(NamedTuple):
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One setting's curve, with its name at `label_x`, `label_y`. `style` numbers its colour and dashes."""

    label: str
    style: int
    marks: tuple[Mark, ...]
    label_x: float
    label_y: float

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{mark.x:.1f} {mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Chart:
    """A measure against the share of bytes, which falls from left to right: further right is packed harder."""

    title: str
    x_title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


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

Scale = Callable[[float], float]


def chart(points: Sequence[Point], measure: Measure, axis: Axis, name: Callable[[Setting], str]) -> Chart:
    """The measure against a share of bytes, one line per setting. `points` includes some that took the measure.

    A setting's style is its place among the settings of `points`, so it looks the same in all plots of the same points.
    """
    taken = means(points, measure)
    x_of, x_ticks = _share_axis([axis.share(mean) for mean in taken.values()])
    y_of, y_ticks = (_log_axis if measure.is_log else _linear_axis)([mean.value for mean in taken.values()])
    curves: defaultdict[Setting, list[Mark]] = defaultdict(list)
    for asked, mean in taken.items():
        curves[asked.setting].append(Mark(x_of(axis.share(mean)), y_of(mean.value), _tell(asked, mean, measure)))
    style = {setting: index for index, setting in enumerate(settings_of(points))}
    lines = [_line(name(setting), style[setting], marks) for setting, marks in curves.items()]
    return Chart(measure.title, axis.title, tuple(_spread(lines)), tuple(x_ticks), tuple(y_ticks))


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


def _share_axis(shares: Sequence[float]) -> tuple[Scale, list[Tick]]:
    """Halvings from left to right, from the largest share to the smallest."""
    logs = [log2(share) for share in shares if share > 0]
    # A share a few per cent beyond a halving (padding, scales) is drawn just outside rather than opening another one.
    high, low = ceil(round(max(logs, default=0), 1)), floor(round(min(logs, default=-1), 1))
    low = min(low, high - 1)

    def x_of(share: float) -> float:
        halvings = log2(share) if share > 0 else low
        return _between(LEFT, RIGHT, (high - halvings) / (high - low))

    return x_of, [Tick(x_of(2.0**power), percent(2.0**power)) for power in range(high, low - 1, -1)]


def _log_axis(values: Sequence[float]) -> tuple[Scale, list[Tick]]:
    """Decades. Zero has no place on it and is drawn on the floor, below every other value."""
    logs = [log10(value) for value in values if value > 0]
    low, high = floor(min(logs, default=-1)), ceil(max(logs, default=0))
    low -= 1 if len(logs) < len(values) else 0
    high = max(high, low + 1)

    def y_of(value: float) -> float:
        return _between(BOTTOM, TOP, (log10(max(value, 10.0**low)) - low) / (high - low))

    floor_text = "0" if len(logs) < len(values) else f"{10.0**low:g}"
    return y_of, [Tick(BOTTOM, floor_text), *(Tick(y_of(10.0**n), f"{10.0**n:g}") for n in range(low + 1, high + 1))]


def _linear_axis(values: Sequence[float]) -> tuple[Scale, list[Tick]]:
    """Tenths up to 1, from the tenth below the smallest value, at least two."""
    low = min(floor(round(10 * min(values, default=0), 6)), 8)

    def y_of(value: float) -> float:
        return _between(BOTTOM, TOP, (10 * value - low) / (10 - low))

    step = 1 if low >= 5 else 2
    return y_of, [Tick(y_of(tenth / 10), f"{tenth / 10:g}") for tenth in range(10, low - 1, -step)]


def _between(start: float, end: float, part: float) -> float:
    return start + part * (end - start)


def _line(label: str, style: int, marks: Sequence[Mark]) -> Line:
    """Named beside the plot, or beside its own end where that is far from there."""
    ordered = sorted(marks, key=itemgetter(0))
    end = ordered[-1]
    return Line(label, style, tuple(ordered), end.x if end.x < (LEFT + RIGHT) / 2 else RIGHT, end.y)


def _spread(lines: Sequence[Line]) -> list[Line]:
    """The lines with labels that would overlap moved apart."""
    spread: list[Line] = []
    for _, column in groupby(sorted(lines, key=attrgetter("label_x", "label_y")), key=attrgetter("label_x")):
        stacked = list(column)
        heights = _apart([line.label_y for line in stacked])
        spread += [replace(line, label_y=height) for line, height in zip(stacked, heights, strict=True)]
    return spread


def _apart(ascending: Sequence[float]) -> list[float]:
    """The heights at least a label apart that are nearest to the given ones in least squares.

    Less a label's height for each one above, the answer only has to ascend: isotonic regression, by pooling each block
    with the one before it while it is lower."""
    blocks: list[tuple[float, int]] = []
    for index, height in enumerate(ascending):
        value, size = height - index * _LABEL_HEIGHT, 1
        while blocks and blocks[-1][0] > value:
            before, count = blocks.pop()
            value, size = (before * count + value * size) / (count + size), count + size
        blocks.append((value, size))
    lowest = max(TOP, BOTTOM - (len(ascending) - 1) * _LABEL_HEIGHT)
    pooled = [min(max(value, TOP), lowest) for value, size in blocks for _ in range(size)]
    return [value + index * _LABEL_HEIGHT for index, value in enumerate(pooled)]
