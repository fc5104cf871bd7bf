"""What `make gpu-check` does, as far as it can be seen without a GPU: its figures at toy size on a CPU with a stand-in
for FlashInfer, and the bookkeeping around them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from packlight.attention.flashinfer.backend import FlashInferAttention
from tests.gpu import check
from tests.gpu.check import GOALS, PARTS, Part, Report, figures_in, slug, table, todo
from tests.gpu.figures import FIGURES, Rig
from tests.support.fake_flashinfer import fake_kernels
from tests.support.tape import TapeEngine
from tests.unit.models.test_dummy import TINY


@pytest.fixture(scope="module", params=[lambda: None, TapeEngine], ids=["eager", "recorded"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 1024}))
    return Rig(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        batch=2,
        context=512,
        long_context=768,
        kept_tokens=64,
        kv_bytes=64 << 20,
        stream_bytes=1 << 20,
        backend=lambda: FlashInferAttention("cpu", fake_kernels()),
        engine=request.param,
    )


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu.figures.SLICE_S", 0.0)
    monkeypatch.setattr("tests.gpu.figures.NUM_ROUNDS", 1)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_measured_and_has_what_its_goals_ask_for(rig: Rig, name: str) -> None:
    found = FIGURES[name](rig)
    assert all(math.isfinite(value) for value in found.values())
    assert {goal.figure for goal in GOALS if goal.part == name} <= found.keys()


def test_packing_lets_as_many_more_requests_in(rig: Rig) -> None:
    found = FIGURES["concurrency"](rig)
    assert found["full"] > 10
    assert found["times"] == pytest.approx((512 + 16) / (64 + 16), rel=0.05)


def test_every_figure_is_a_part_and_every_goal_has_one() -> None:
    assert {part.name for part in PARTS if part.figures} == FIGURES.keys()
    assert {goal.part for goal in GOALS} <= FIGURES.keys()
    assert sum(part.limit_s for part in PARTS) < 1200


def test_what_a_part_said_is_kept(tmp_path: Path) -> None:
    part = Part("p", ("-c", "print('hello'); print('{\"a\": 2}')"), 30.0, figures=True)
    found = check.run(part, sys.executable, 30.0)
    assert (found["rc"], found["figures"]) == (0, {"a": 2})
    assert "hello" in found["said"]
    assert check.run(Part("p", ("-c", "1 / 0"), 30.0), sys.executable, 30.0)["rc"] == 1
    hung = Part("p", ("-c", "print('begun', flush=True); import time; time.sleep(60)"), 30.0)
    found = check.run(hung, sys.executable, 2.0)
    assert found["rc"] is None
    assert "begun" in found["said"]


def test_the_same_commit_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = Report(path, {"device": "d", "commit": "c1"})
    first.add("tests", {"rc": 0, "seconds": 1.0})
    first.add("graphs", {"rc": 1, "seconds": 1.0, "figures": {}})
    again = Report(path, {"device": "d", "commit": "c1"})
    names = [part.name for part in todo(PARTS, again.parts, again=False)]
    assert "tests" not in names
    assert "graphs" in names
    assert todo(PARTS, again.parts, again=True) == list(PARTS)
    assert Report(path, {"device": "d", "commit": "c2"}).parts == {}


def test_the_table_says_what_was_missed_and_what_was_not_measured() -> None:
    parts = {
        "tests": {"rc": 0, "seconds": 3.0},
        "graphs": {"rc": 0, "seconds": 1.0, "figures": {"speedup": 1.5}},
        "selection": {"rc": 0, "seconds": 1.0, "figures": {"share_of_prefill": 0.005}},
    }
    lines = "\n".join(table(parts))
    assert "tests        passed in 3.0 s" in lines
    assert "graph replay, batch 1: times faster than eager: 1.5 (goal >= 2, MISSED)" in lines
    assert "share of prefill: 0.005 (goal <= 0.01)" in lines
    assert "pack and copy to pinned memory: share of the link: not measured" in lines


def test_names_and_last_lines() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert figures_in('x\n{"a": 1}\n{broken\nbye') == {"a": 1}
    assert figures_in("nothing") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "no GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
