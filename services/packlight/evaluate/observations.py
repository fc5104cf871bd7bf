"""From what was seen of single prompts to the points of a report.

Knows sums, means and percentiles. Knows no model, no tensor and no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from packlight.evaluate.packing import Footprint
from packlight.evaluate.results import Cell, Point
from packlight.evaluate.variants import Variant


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One prompt's comparison with exact KV: an entry per token that was fed. See `streams.ForcedStream`."""

    kl_nats: tuple[float, ...]
    agrees: tuple[bool, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One variant on one prompt: scored, or compared, by `task`. `depth` is None where a prompt has none; `answer` are
    the tokens that were scored."""

    variant: Variant
    task: str
    length: int
    depth: float | None
    footprint: Footprint
    score: float | None = None
    answer: tuple[int, ...] = ()
    fidelity: Fidelity | None = None


def to_points(observations: Iterable[Observation]) -> tuple[Point, ...]:
    """A point per (recipe, codec, factor, task), in the order of first sight."""
    together: dict[tuple[str, str, float, str], list[Observation]] = defaultdict(list)
    for seen in observations:
        together[seen.variant.recipe, seen.variant.codec, seen.variant.factor, seen.task].append(seen)
    return tuple(_point(group) for group in together.values())


def _point(group: Sequence[Observation]) -> Point:
    first, footprints = group[0], [seen.footprint for seen in group]
    compared = [seen.fidelity for seen in group if seen.fidelity is not None]
    kl_nats = [value for fidelity in compared for value in fidelity.kl_nats]
    scores = [seen.score for seen in group if seen.score is not None]
    select_s = fsum(each.select_s for each in footprints)
    return Point(
        recipe=first.variant.recipe,
        codec=first.variant.codec,
        factor=first.variant.factor,
        task=first.task,
        num_samples=len(group),
        num_kept_tokens=_mean([each.num_kept_tokens for each in footprints]),
        kept_share=sum(each.packed_bytes for each in footprints) / sum(each.exact_bytes for each in footprints),
        read_share=fsum(each.num_read_tokens for each in footprints)
        / fsum(each.num_exact_read_tokens for each in footprints),
        retained_mass=_mean([each.retained_mass for each in footprints]),
        kl_mean=_mean(kl_nats) if kl_nats else None,
        kl_p95=float(np.percentile(kl_nats, 95)) if kl_nats else None,
        top1_agreement=_mean([float(agrees) for each in compared for agrees in each.agrees]) if kl_nats else None,
        attention_error=_mean([error for each in compared for error in each.errors]) if kl_nats else None,
        score=_mean(scores) if scores else None,
        select_share=select_s / (select_s + fsum(each.prefill_s for each in footprints)),
        cells=_cells(group),
    )


def _cells(group: Sequence[Observation]) -> tuple[Cell, ...]:
    """The scores by length and depth, in ascending order."""
    scores: dict[tuple[int, float], list[float]] = defaultdict(list)
    for seen in group:
        if seen.score is not None and seen.depth is not None:
            scores[seen.length, seen.depth].append(seen.score)
    return tuple(
        Cell(length=length, depth=depth, score=_mean(values), num_samples=len(values))
        for (length, depth), values in sorted(scores.items())
    )


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
