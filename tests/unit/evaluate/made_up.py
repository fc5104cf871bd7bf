"""Results that nobody measured, of the shape that a full run has. For tests of reports only."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import product
from math import log2
from random import Random

from packlight.evaluate.results import TEACHER_FORCED, Cell, Header, Point, Results

RECIPES = (
    "none", "streaming_llm", "h2o", "snapkv", "pyramidkv", "adakv", "cake", "rocketkv", "rocketkv_mt", "quest",
    "freekv", "mass",
)  # fmt: skip
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
TASKS = ("niah_single_1", "niah_single_2", "vt", "cwe")
LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = tuple(tenth / 10 for tenth in range(0, 11, 2))
HEADER = Header(
    model="made-up-135M",
    dtype="float32",
    machine="a machine that does not exist",
    started_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    command="packlight eval --made-up",
    seed=0,
    protocol="the question is in the window",
    versions={"packlight": "0.0.0"},
    durations_s={"niah_single_1": 12.5, TEACHER_FORCED: 7.0},
)


def made_up_results(codecs: tuple[str, ...] = ("native",)) -> Results:
    """Every recipe at every factor on every task, the same each time."""
    rng = Random(0)
    points = []
    for index, (recipe, codec) in enumerate(product(RECIPES, codecs)):
        quality = 1 - 0.08 * (index % 12)
        for factor in (1.0,) if recipe == "none" else FACTORS:
            points += [_point(recipe, codec, factor, task, quality, rng) for task in (*TASKS, TEACHER_FORCED)]
    return Results(header=HEADER, points=tuple(points))


def _point(recipe: str, codec: str, factor: float, task: str, quality: float, rng: Random) -> Point:
    harm = log2(factor) / 5 * (1.3 - quality)
    keeps_all = recipe in ("quest", "freekv")
    bytes_share = 1.0 if codec == "native" else 0.28
    is_task = task != TEACHER_FORCED
    cells = _cells(harm, rng) if task.startswith("niah_") else ()
    return Point(
        recipe=recipe,
        codec=codec,
        factor=factor,
        task=task,
        num_samples=len(cells) or 20,
        num_kept_tokens=4096 if keeps_all else 4096 / factor,
        kept_share=bytes_share * (1 if keeps_all else 1 / factor),
        read_share=bytes_share * min(1, 1.08 / factor),
        retained_mass=max(0.0, 1 - 0.5 * harm),
        select_share=0.0 if recipe == "none" else 0.02,
        score=max(0.0, min(1.0, 1 - harm + rng.uniform(-0.03, 0.03))) if is_task else None,
        kl_mean=None if is_task else 2 * harm**2 * rng.uniform(0.8, 1.2),
        kl_p95=None if is_task else 6 * harm**2,
        top1_agreement=None if is_task else max(0.0, 1 - 0.4 * harm),
        attention_error=None if is_task else 0.5 * harm,
        cells=cells,
    )


def _cells(harm: float, rng: Random) -> tuple[Cell, ...]:
    return tuple(
        Cell(length=length, depth=depth, score=float(rng.random() > harm * (0.6 + length / 8192)), num_samples=1)
        for length, depth in product(LENGTHS, DEPTHS)
    )
