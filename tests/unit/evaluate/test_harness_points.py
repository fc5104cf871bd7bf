"""From observations to points, and to a file that is whole at any time."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from packlight.core.errors import ConfigError
from packlight.evaluate.journal import Journal
from packlight.evaluate.observations import Fidelity, Observation, to_points
from packlight.evaluate.packing import Footprint
from packlight.evaluate.results import TEACHER_FORCED, Header, load
from packlight.evaluate.textfile import write
from packlight.evaluate.variants import NATIVE, make_variant, parse_recipes

SNAPKV = make_variant(parse_recipes("snapkv")[0], NATIVE, 4)
QUEST = make_variant(parse_recipes("quest")[0], NATIVE, 4)


def footprint(num_prompt_tokens: int = 100, **changes) -> Footprint:
    values = {
        "num_kept_tokens": num_prompt_tokens / 4,
        "num_read_tokens": num_prompt_tokens / 8,
        "num_exact_read_tokens": num_prompt_tokens / 2,
        "packed_bytes": num_prompt_tokens * 3,
        "exact_bytes": num_prompt_tokens * 10,
        "retained_mass": 0.5,
        "select_s": 1.0,
        "prefill_s": 9.0,
    }
    return Footprint(num_prompt_tokens=num_prompt_tokens, **(values | changes))


def scored(score: float, depth: float | None = 0.5, length: int = 100, **changes) -> Observation:
    return Observation(SNAPKV, "niah_single_1", length, depth, footprint(length, **changes), score=score)


def compared(*kl_nats: float, agrees: bool = True) -> Observation:
    count = len(kl_nats)
    fidelity = Fidelity(kl_nats, (agrees,) * count, (0.25,) * count)
    return Observation(SNAPKV, TEACHER_FORCED, 100, None, footprint(), fidelity=fidelity)


def test_scores_and_shares_of_one_point():
    (point,) = to_points([scored(1.0), scored(0.0, length=300, select_s=3.0, retained_mass=1.0)])
    assert (point.recipe, point.codec, point.factor, point.task) == ("snapkv", NATIVE, 4, "niah_single_1")
    assert (point.num_samples, point.score) == (2, 0.5)
    assert point.num_kept_tokens == 50
    assert (point.kept_share, point.read_share) == (pytest.approx(0.3), pytest.approx(0.25))
    assert point.retained_mass == 0.75
    assert point.select_share == pytest.approx(4 / 22)
    assert (point.kl_mean, point.kl_p95, point.top1_agreement, point.attention_error) == (None,) * 4


def test_comparisons_are_means_over_positions_not_over_prompts():
    (point,) = to_points([compared(1.0), compared(0.0, 0.0, 0.0, agrees=False)])
    assert (point.kl_mean, point.top1_agreement, point.attention_error) == (0.25, 0.25, 0.25)
    assert point.kl_p95 == pytest.approx(0.85)
    assert point.score is None
    assert point.cells == ()


def test_a_point_for_each_variant_and_task():
    seen = [scored(1.0), compared(0.5), Observation(QUEST, "vt", 100, None, footprint(), score=0.2)]
    assert [(point.recipe, point.task) for point in to_points(seen)] == [
        ("snapkv", "niah_single_1"),
        ("snapkv", TEACHER_FORCED),
        ("quest", "vt"),
    ]


def test_cells_are_sorted_and_leave_out_prompts_without_a_depth():
    (point,) = to_points([scored(1.0, 0.9), scored(0.0, 0.1), scored(0.5, 0.1), scored(1.0, None), scored(1, 0.1, 50)])
    cells = [(cell.length, cell.depth, cell.score, cell.num_samples) for cell in point.cells]
    assert cells == [(50, 0.1, 1.0, 1), (100, 0.1, 0.25, 2), (100, 0.9, 1.0, 1)]


def journal(path) -> Journal:
    header = Header(
        model="tiny",
        dtype="float32",
        machine="a laptop",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        command="packlight eval",
        seed=0,
        durations_s={"loading": 2.0},
    )
    ticks = iter(range(0, 1000, 10))
    return Journal(header, path, lambda: float(next(ticks)))


def test_the_file_is_whole_after_every_prompt(tmp_path):
    path = tmp_path / "results.json"
    kept = journal(path)
    kept.add([scored(1.0)])
    assert [point.num_samples for point in load(path).points] == [1]
    kept.add([scored(0.0), compared(0.1)])
    results = load(path)
    assert [point.num_samples for point in results.points] == [2, 1]
    assert results.header.durations_s == {"loading": 2.0, "measuring": 20.0}
    assert results.points == kept.results().points
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = journal(None)
    kept.add([scored(1.0)])
    assert kept.results().points[0].score == 1.0
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*gone/x\.json: No such file"):
        write(tmp_path / "gone" / "x.json", "")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write(path, json.dumps({"old": True}))
    with pytest.raises(UnicodeEncodeError):
        write(path, "\ud800")
    assert json.loads(path.read_text()) == {"old": True}
