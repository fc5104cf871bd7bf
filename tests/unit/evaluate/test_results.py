"""Results survive JSON, and numbers that mean nothing never get in."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from packlight.core.errors import ConfigError
from packlight.evaluate.results import Cell, Header, Point, Results, load

SHARES = st.floats(0, 1)
CELLS = st.builds(
    Cell, length=st.integers(1, 10**6), depth=SHARES, score=SHARES, num_samples=st.integers(1, 100)
)  # fmt: skip
POINTS = st.builds(
    Point,
    recipe=st.text(),
    codec=st.text(),
    factor=st.floats(1, 1024),
    task=st.text(),
    num_samples=st.integers(1, 10**6),
    num_kept_tokens=st.floats(0, 1e9),
    kept_share=st.floats(0, 2),
    read_share=st.floats(0, 2),
    retained_mass=st.none() | SHARES,
    kl_mean=st.none() | st.floats(0, 100),
    kl_p95=st.none() | st.floats(0, 100),
    top1_agreement=st.none() | SHARES,
    attention_error=st.none() | st.floats(0, 100),
    score=st.none() | SHARES,
    select_share=st.none() | SHARES,
    cells=st.lists(CELLS, max_size=3).map(tuple),
)
HEADER = Header(
    model="SmolLM2",
    dtype="float32",
    machine="2 cores",
    started_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    command="packlight eval",
    seed=0,
    versions={"torch": "2.8"},
    durations_s={"niah_single_1": 12.5},
)
POINT: dict[str, Any] = {
    "recipe": "snapkv",
    "codec": "bf16",
    "factor": 8.0,
    "task": "vt",
    "num_samples": 1,
    "num_kept_tokens": 3.0,
    "kept_share": 0.1,
    "read_share": 0.1,
}


@settings(deadline=None)
@given(points=st.lists(POINTS, max_size=4))
def test_results_survive_json(points: list[Point]) -> None:
    results = Results(header=HEADER, points=tuple(points))
    text = results.to_json()
    assert Results.from_json(text) == results
    assert Results.from_json(text).to_json() == text


def test_results_are_read_back_from_a_file(tmp_path: Path) -> None:
    results = Results(header=HEADER, points=(Point(**POINT),))
    (tmp_path / "results.json").write_text(results.to_json())
    assert load(tmp_path / "results.json") == results


def test_a_measure_that_was_not_taken_is_absent() -> None:
    point = json.loads(Results(header=HEADER, points=(Point(**POINT),)).to_json())["points"][0]
    assert "score" not in point


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kept_share", float("nan")),
        ("kl_mean", float("inf")),
        ("kl_mean", -0.01),
        ("top1_agreement", 1.01),
        ("retained_mass", -0.01),
        ("score", 1.5),
        ("factor", 0.5),
        ("num_samples", 0),
    ],
)
def test_a_number_that_means_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Point(**{**POINT, field: value})


def test_rounding_does_not_take_a_measure_out_of_its_range() -> None:
    point = Point(**POINT, retained_mass=1.00002, kl_mean=-1e-6, top1_agreement=-1e-9)
    assert (point.retained_mass, point.kl_mean, point.top1_agreement) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "document"),
        ("{}", "header: Field required"),
        (json.dumps({**json.loads(Results(header=HEADER, points=()).to_json()), "format": 2}), "format"),
        (json.dumps({**json.loads(Results(header=HEADER, points=()).to_json()), "extra": 2}), "extra"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused_by_name(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"broken\.json: .*{problem}"):
        load(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        load(tmp_path / "none.json")
