"""What `make gpu-check` does, as far as it can be seen without a GPU: its figures at toy size on a CPU with a stand-in
for FlashInfer, and the bookkeeping around them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from packlight.attention.flashinfer.backend import FlashInferAttention
from tests.gpu import check, machine, process
from tests.gpu.check import PARTS, Part, Session, slug
from tests.gpu.figures import FIGURES
from tests.gpu.kernels import KERNELS
from tests.gpu.machine import last_object
from tests.gpu.report import GOALS, Report, table
from tests.gpu.rig import Rig
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
        num_rounds=1,
        slice_s=0.0,
        backend=lambda: FlashInferAttention("cpu", fake_kernels()),
        engine=request.param,
    )


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_measured_and_has_what_its_goals_ask_for(rig: Rig, name: str) -> None:
    found = FIGURES[name](rig)
    assert all(math.isfinite(value) for value in found.values())
    assert {goal.figure for goal in GOALS if goal.part == name} <= found.keys()


def test_packing_lets_as_many_more_requests_in(rig: Rig) -> None:
    found = FIGURES["concurrency"](rig)
    assert found["full"] > 10
    assert found["times"] == pytest.approx((512 + 16) / (64 + 16), rel=0.05)


def test_what_was_measured_is_not_measured_again(rig: Rig) -> None:
    full = FIGURES["step_full"](rig)
    assert FIGURES["step_packed"](rig)["full_ms"] == full["step_ms"]


def test_every_figure_is_a_part_and_every_goal_has_one() -> None:
    assert set(check.FIGURES) == FIGURES.keys()
    assert {goal.part for goal in GOALS} <= FIGURES.keys()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Stands for `python -m tests.gpu.figures`: "slow" hangs, "broken" raises.
STAND_IN = """
import json, sys, time
for name in sys.argv[1:]:
    print("about to measure", name, flush=True)
    if name == "slow":
        time.sleep(60)
    if name == "broken":
        raise RuntimeError("an illegal memory access was encountered")
    print(json.dumps({"figure": name, "speedup": 2.5}), flush=True)
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    report = Report("r.json", [tmp_path], {"device": "d", "commit": "c1"})
    return Session(report, tmp_path / "r.log", os.environ, time.monotonic() + 60)


def parts_of(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "r.json").read_text())["parts"])


def test_what_a_part_said_is_kept(tmp_path: Path, session: Session) -> None:
    session.run(Part("good", ("-c", "print('hello')"), 30.0))
    session.run(Part("bad", ("-c", "1 / 0"), 30.0))
    session.run(Part("hung", ("-c", "print('begun', flush=True); import time; time.sleep(60)"), 4.0))
    found = parts_of(tmp_path)
    session.run(Part("tool", ("-c", "print('hello')"), 30.0, ("/nowhere/sanitizer",)))
    assert [found[name]["rc"] for name in ("good", "bad", "hung")] == [0, 1, None]
    assert parts_of(tmp_path)["tool"]["rc"] == 127
    assert [found[name]["said"] for name in ("good", "hung")] == ["hello\n", "begun\n"]
    assert "ZeroDivisionError" in found["bad"]["said"]
    assert "ZeroDivisionError" in (tmp_path / "r.log").read_text()


def test_a_figure_that_fails_or_hangs_costs_itself_only(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(check, "FIGURE_COMMAND", (str(tmp_path / "stand_in.py"),))
    monkeypatch.setattr(check, "FIGURE_LIMIT_S", 4.0)
    monkeypatch.setattr(check, "FIGURES", ("graphs", "broken", "attention", "slow", "link"))
    check.run_parts(session, check.FIGURES)
    found = parts_of(tmp_path)
    assert {name: result["rc"] for name, result in found.items()} == {
        "graphs": 0, "broken": 1, "attention": 0, "slow": None, "link": 0,
    }  # fmt: skip
    assert found["attention"]["figures"] == {"speedup": 2.5}
    assert "illegal memory access" in found["broken"]["said"]


def test_a_part_may_run_beside_the_next_one(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for a file that the other one writes."""
    code = (
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:])\n"
        "own.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    parts = (Part("first", ("-c", code, a, b), 20.0, is_beside=True), Part("second", ("-c", code, b, a), 20.0))
    monkeypatch.setattr(check, "PARTS", parts)
    check.run_parts(session, ["first", "second"])
    assert {name: result["rc"] for name, result in parts_of(tmp_path).items()} == {"first": 0, "second": 0}


def test_nothing_is_begun_when_time_is_up(tmp_path: Path) -> None:
    report = Report("r.json", [tmp_path], {"device": "d", "commit": "c1"})
    session = Session(report, tmp_path / "r.log", os.environ, time.monotonic() + check.LEAST_S - 1)
    check.run_parts(session, [part.name for part in PARTS])
    assert report.parts == {}


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    """A compiler, say, of a part that is over its limit; and one that outlives its part does not hold it up."""
    script = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); "
        "time.sleep(60 if sys.argv[1] == 'hang' else 0)"
    )
    for how, expected in (("hang", None), ("leave", 0)):
        heard: list[str] = []
        rc = process.run(
            [sys.executable, "-c", script, how], limit_s=4.0, ends_at=time.monotonic() + 30,
            hear=lambda line, heard=heard: bool(heard.append(line)), cwd=tmp_path, environ=os.environ,
        )  # fmt: skip
        assert rc == expected
        wait_until_gone(int(heard[0]))


def wait_until_gone(pid: int) -> None:
    status = Path(f"/proc/{pid}/stat")
    for _ in range(500):
        if not status.is_file() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def test_kernels_are_named_for_what_they_are() -> None:
    for name, (is_prefill, _, head_dim, dtype, window) in KERNELS.items():
        assert is_prefill == name.startswith("prefill"), name
        assert str(head_dim) in name.split("-"), name
        assert (window is not None, dtype == torch.float8_e4m3fn) == (name.endswith("window"), name.endswith("fp8"))


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_commit_goes_on_where_it_was(tmp_path: Path) -> None:
    names = ["tests", "graphs", "link"]
    first = Report("r.json", [tmp_path / "a", tmp_path / "b"], {"device": "d", "commit": "c1"})
    first.add("tests", {"rc": 0, "seconds": 1.0})
    first.add("graphs", {"rc": 1, "seconds": 1.0, "figures": {}})
    assert (tmp_path / "a" / "r.json").read_text() == (tmp_path / "b" / "r.json").read_text()
    assert Report("r.json", [tmp_path / "new", tmp_path / "b"], {"commit": "c1"}).lacks(names) == ["graphs", "link"]
    assert Report("r.json", [tmp_path / "a"], {"commit": "c2"}).lacks(names) == names


def test_without_a_commit_nothing_is_taken_over(tmp_path: Path) -> None:
    Report("r.json", [tmp_path], {"commit": None}).add("tests", {"rc": 0})
    assert Report("r.json", [tmp_path], {"commit": None}).parts == {}


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
    assert last_object('x\n{"a": 1}\n{broken\nbye') == {"a": 1}
    assert last_object("nothing") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "no GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def toolkit(home: Path) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch(0o755)
    return home


def test_the_compiler_is_found_where_it_lies(tmp_path: Path) -> None:
    """By name, or on the path: not where a link to it lies, which has no headers beside it."""
    first, second = toolkit(tmp_path / "cuda-13.0"), toolkit(tmp_path / "other")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(first / "bin" / "nvcc")
    path = {"PATH": str(tmp_path / "bin")}
    assert machine.cuda_home(path) == first
    assert machine.cuda_home({"CUDA_HOME": str(second), **path}) == second
    assert machine.cuda_home({"CUDA_HOME": str(tmp_path / "nowhere"), **path}) == first


def test_what_the_toolkit_lacks_is_linked_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LINKS", tmp_path / "links")
    home, driver = toolkit(tmp_path / "cuda"), tmp_path / "driver"
    driver.mkdir()
    for name in ("libcuda.so.1", "libcudart.so.13"):
        (driver / name).touch()
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    found = machine.environment({"CUDA_HOME": str(home), "LD_LIBRARY_PATH": str(driver), "PATH": "/usr/bin"})
    assert found["FLASHINFER_EXTRA_LDFLAGS"] == f"-L{tmp_path / 'links'}"
    assert {link.name: link.resolve().name for link in (tmp_path / "links").iterdir()} == {"libcuda.so": "libcuda.so.1"}


def test_carried_packages_come_before_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As real Python sees it: a wheel's module and its command, and none of it installed."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / "carried-1.0-py3-none-any.whl")
    for name, folder in (("WHEELS", wheels), ("SITE", tmp_path / "site"), ("LINKS", tmp_path / "links")):
        monkeypatch.setattr(machine, name, folder)
    machine.unpack_wheels()
    (tmp_path / "site" / "carried.py").write_text("# still here\n")
    machine.unpack_wheels()
    assert (tmp_path / "site" / "carried.py").read_text() == "# still here\n"
    environ = machine.environment(os.environ)
    code = "import carried, shutil, tests.gpu; print(carried.__file__, shutil.which('carry'))"
    said = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(tmp_path / "site" / "carried.py"), str(tmp_path / "site" / "bin" / "carry")]


def write_wheel(path: Path) -> None:
    entries = {
        "carried.py": "",
        "carried-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n",
        "carried-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "carried-1.0.dist-info/entry_points.txt": "[console_scripts]\ncarry = carried:main\n",
        "carried-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in entries.items():
            wheel.writestr(name, text)


def test_a_machine_without_tools_is_described_all_the_same() -> None:
    found = machine.describe({"PATH": "/nowhere"}, None)
    assert (found["nvcc"], found["ninja"], found["commit"]) == (None, None, None)
    assert machine.commit_of({"PATH": "/nowhere"}, "c7") == "c7"
