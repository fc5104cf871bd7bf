"""What a report says about a run: the measures, and their means over the points that took them.

Knows results. Does not know tables, plots or files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple

from packlight.evaluate.results import Cell, Point

# The codec that ships KV as it was computed; it goes without saying.
_PLAIN_CODEC = "native"


class Setting(NamedTuple):
    """What is compared: one line of a plot, one row of a table."""

    recipe: str
    codec: str

    @property
    def label(self) -> str:
        return self.recipe if self.codec == _PLAIN_CODEC else f"{self.recipe} + {self.codec}"


class Asked(NamedTuple):
    """A setting asked for `factor`-fold compression."""

    setting: Setting
    factor: float


class Mean(NamedTuple):
    """A measure's mean, with the means of the shares of those same points: the two coordinates of a plot."""

    value: float
    kept_share: float
    read_share: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Measure:
    """One way in which packed KV is compared with exact KV. `of` is None for points that did not take it."""

    title: str
    better: str
    of: Callable[[Point], float | None]
    show: Callable[[float], str]
    is_log: bool = False


def _needle_score(point: Point) -> float | None:
    return point.score if point.task.startswith("niah_") else None


NEEDLE_SCORE = Measure(
    "Needle score", "share of the hidden values found; higher is better", _needle_score, "{:.2f}".format
)
KL = Measure("KL divergence", "mean nats a token; lower is better", lambda point: point.kl_mean, "{:.3g}".format, True)
TOP1 = Measure(
    "Top-1 agreement",
    "share of positions with the same most likely token; higher is better",
    lambda point: point.top1_agreement,
    "{:.3f}".format,
)
MEASURES = (NEEDLE_SCORE, KL, TOP1)


def asked_of(point: Point) -> Asked:
    return Asked(Setting(point.recipe, point.codec), point.factor)


def settings_of(points: Iterable[Point]) -> list[Setting]:
    """In the order of the run."""
    return list(dict.fromkeys(asked_of(point).setting for point in points))


def factors_of(points: Iterable[Point]) -> list[float]:
    """Ascending."""
    return sorted({point.factor for point in points})


def tasks_of(points: Iterable[Point]) -> list[str]:
    """Those with a score, in the order of the run."""
    return list(dict.fromkeys(point.task for point in points if point.score is not None))


def by_asked(points: Sequence[Point]) -> dict[Asked, list[Point]]:
    """The points of each setting and factor, in the order of settings, then factors."""
    grouped: defaultdict[Asked, list[Point]] = defaultdict(list)
    for point in points:
        grouped[asked_of(point)].append(point)
    place = {setting: index for index, setting in enumerate(settings_of(points))}
    return {asked: grouped[asked] for asked in sorted(grouped, key=lambda asked: (place[asked.setting], asked.factor))}


def mean(points: Iterable[Point], of: Callable[[Point], float | None]) -> float | None:
    """The mean of `of` over the points that have it, each weighing as many samples as it stands for."""
    weighted = [(value, point.num_samples) for point in points if (value := of(point)) is not None]
    total = sum(weight for _, weight in weighted)
    return fsum(value * weight for value, weight in weighted) / total if total else None


def means(points: Sequence[Point], measure: Measure) -> dict[Asked, Mean]:
    """The measure at each setting and factor where it was taken."""
    found: dict[Asked, Mean] = {}
    for asked, group in by_asked(points).items():
        taken = [point for point in group if measure.of(point) is not None]
        value = mean(taken, measure.of)
        kept, read = mean(taken, lambda point: point.kept_share), mean(taken, lambda point: point.read_share)
        if value is not None and kept is not None and read is not None:
            found[asked] = Mean(value, kept, read, sum(point.num_samples for point in taken))
    return found


def merge_cells(points: Iterable[Point]) -> tuple[Cell, ...]:
    """One grid of all the points' needle cells, by depth and length."""
    grouped: defaultdict[tuple[float, int], list[Cell]] = defaultdict(list)
    for point in points:
        for cell in point.cells:
            grouped[cell.depth, cell.length].append(cell)
    return tuple(_merge(group) for _, group in sorted(grouped.items()))


def _merge(cells: list[Cell]) -> Cell:
    num_samples = sum(cell.num_samples for cell in cells)
    score = fsum(cell.score * cell.num_samples for cell in cells) / num_samples
    return Cell(length=cells[0].length, depth=cells[0].depth, score=score, num_samples=num_samples)
