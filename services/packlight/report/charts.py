"""Plots as numbers ready to draw: lines in pixels, ticks, labels that do not overlap.

Knows geometry. Colours and SVG are the page template's (`base.html.j2`), which styles series by number. What is plotted
is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, floor, log10
from operator import attrgetter, itemgetter
from typing import NamedTuple

WIDTH, HEIGHT = 620, 364
LEFT, RIGHT, TOP, BOTTOM = 58, 470, 14, 316
_LABEL_HEIGHT = 15
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


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
    """A curve, with its name at `label_x`, `label_y`. `style` numbers its colour and dashes."""

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
    title: str
    x_title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


class Value(NamedTuple):
    """A measured value in its own units; `text` is its tooltip."""

    x: float
    y: float
    text: str


class Curve(NamedTuple):
    label: str
    style: int
    values: Sequence[Value]


Scale = Callable[[float], float]
Axis = tuple[Scale, list[Tick]]
# Makes an axis that runs between two pixels and holds all the values.
MakeAxis = Callable[[Sequence[float], float, float], Axis]


def plot(title: str, x_title: str, curves: Sequence[Curve], x_axis: MakeAxis, y_axis: MakeAxis) -> Chart:
    """The curves that have values, on axes that hold them all."""
    values = [value for curve in curves for value in curve.values]
    x_of, x_ticks = x_axis([value.x for value in values], LEFT, RIGHT)
    y_of, y_ticks = y_axis([value.y for value in values], BOTTOM, TOP)
    lines = [
        make_line(curve.label, curve.style, [Mark(x_of(x), y_of(y), text) for x, y, text in curve.values])
        for curve in curves
        if curve.values
    ]
    return Chart(title, x_title, tuple(spread(lines)), tuple(x_ticks), tuple(y_ticks))


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """From zero to the first round number that is not below any of the values, in at most six steps."""
    step = _round_up(max([*values, 1e-9]) / 5)
    num_steps = max(ceil(max(values, default=0) / step), 1)

    def at(value: float) -> float:
        return between(start, end, value / (step * num_steps))

    return at, [Tick(at(index * step), f"{index * step:g}") for index in range(num_steps + 1)]


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Decades around the values. Zero has no place on it and is drawn at `start`, before every other value."""
    logs = [log10(value) for value in values if value > 0]
    low, high = floor(min(logs, default=-1)), ceil(max(logs, default=0))
    low -= 1 if len(logs) < len(values) else 0
    high = max(high, low + 1)

    def at(value: float) -> float:
        return between(start, end, (log10(max(value, 10.0**low)) - low) / (high - low))

    first = "0" if len(logs) < len(values) else f"{10.0**low:g}"
    return at, [Tick(start, first), *(Tick(at(10.0**n), f"{10.0**n:g}") for n in range(low + 1, high + 1))]


def between(start: float, end: float, part: float) -> float:
    return start + part * (end - start)


def make_line(label: str, style: int, marks: Sequence[Mark]) -> Line:
    """Named beside the plot, or beside its own end where that is far from there."""
    ordered = sorted(marks, key=itemgetter(0))
    end = ordered[-1]
    return Line(label, style, tuple(ordered), end.x if end.x < (LEFT + RIGHT) / 2 else RIGHT, end.y)


def spread(lines: Sequence[Line]) -> list[Line]:
    """The lines with labels that would overlap moved apart."""
    moved: list[Line] = []
    for _, column in groupby(sorted(lines, key=attrgetter("label_x", "label_y")), key=attrgetter("label_x")):
        stacked = list(column)
        heights = _apart([line.label_y for line in stacked])
        moved += [replace(line, label_y=height) for line, height in zip(stacked, heights, strict=True)]
    return moved


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


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))
