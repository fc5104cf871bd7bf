"""`packlight eval` as a user meets it: a tiny model in a folder, flags, files and exit codes."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
import transformers

from packlight.cli import main
from packlight.evaluate import setup
from packlight.evaluate.progress import Progress
from packlight.evaluate.results import TEACHER_FORCED, load
from tests.support.tiny_models import TINY_CONFIGS, write_model_folder

SMALL = ["--lengths", "600", "--depths", "1", "--factors", "4", "--max-new-tokens", "2", "--codecs", "native"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(TINY_CONFIGS["llama"]().to_dict() | {"max_position_embeddings": 2048}))
    return write_model_folder(tmp_path_factory.mktemp("tiny"), transformers.AutoModelForCausalLM.from_config(config))


def evaluate(folder, *flags: str) -> int:
    pools = ["prefill.kv_memory_bytes=8000000", "decode.kv_memory_bytes=8000000"]
    settings = [f"model.path={folder.path}", "model.dtype=float32", *pools]
    return main(["eval", *SMALL, *(word for setting in settings for word in ("--set", setting)), *flags])


def test_a_run_and_its_files(folder, tmp_path, capsys):
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "html", "markdown")}
    flags = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    tasks = f"niah_single_1,{TEACHER_FORCED}"
    assert evaluate(folder, "--recipes", "snapkv,snapkv:kernel=5,quest", "--tasks", tasks, *flags) == 0
    printed = capsys.readouterr()
    results = load(files["json"])
    seen = {(point.recipe, point.factor, point.task) for point in results.points}
    recipes = [("none", 1), ("snapkv", 4), ("snapkv:kernel=5", 4), ("quest", 4)]
    assert seen == {(*recipe, task) for recipe in recipes for task in ("niah_single_1", TEACHER_FORCED)}
    assert results.header.command.startswith("packlight eval --lengths 600")
    assert results.header.dtype == "float32"
    assert set(results.header.durations_s) == {"loading", "measuring"}
    assert {"packlight", "torch"} <= set(results.header.versions)
    for text in (printed.out, files["html"].read_text(), files["markdown"].read_text()):
        assert "snapkv:kernel=5" in text
    assert "0 of 8 done, now niah_single_1 600" in printed.err
    assert "done, now" not in printed.out


def test_an_interrupted_run_keeps_what_it_has(folder, tmp_path, capsys, monkeypatch):
    """The second prompt is never finished."""
    build = setup.build_harness

    def interrupted(*args, **kwargs):
        harness = build(*args, **kwargs)
        first = next(harness.run())

        class Interrupted:
            def run(self):
                yield first
                raise KeyboardInterrupt

        return Interrupted()

    monkeypatch.setattr(setup, "build_harness", interrupted)
    path = tmp_path / "results.json"
    assert evaluate(folder, "--recipes", "snapkv", "--tasks", "niah_single_1,vt", "--json", str(path)) == 130
    assert {point.task for point in load(path).points} == {"niah_single_1", TEACHER_FORCED}
    assert "snapkv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipes", "vanish"], "unknown recipe 'vanish'"),
        (["--codecs", "zip"], "unknown codec 'zip'"),
        (["--tasks", "riddle"], "unknown task 'riddle'"),
        (["--factors", "two"], "--factors: got 'two', must be numbers separated by commas"),
        (["--factors", "0.5"], "factor 0.5 is below 1"),
        (["--lengths", "100000"], "--lengths: got 100000, must be from 1 to"),
        (["--lengths", "50"], "task niah_single_1 does not fit into 50 tokens"),
        (["--tasks", "niah_single_1,cwe"], "task cwe does not fit into 600 tokens"),
        (["--depths", "0"], "--depths: got 0, must be at least 1"),
        (["--samples", "0"], "--samples: got 0, must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0, must be at least 1"),
        (["--coded", "vanish"], "--coded: unknown recipe 'vanish'"),
        (["--html", "/no/such/folder/x.html"], "cannot write /no/such/folder/x.html: there is no such folder"),
        (["--set", "decode.kv_memory_bytes=100000"], "raise decode.kv_memory_bytes"),
    ],
)
def test_what_cannot_be_run_is_refused(folder, flags, message, capsys):
    assert evaluate(folder, "--recipes", "snapkv", "--tasks", "niah_single_1", *flags) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "done, now" not in printed.err or "decode." in message, "found out before anything is computed"
    assert "Traceback" not in printed.err


def test_flags_are_read_without_torch():
    """The command line answers at once."""
    code = "import sys, packlight.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(stream, total=4)
    progress.step("vt 512", 0)
    progress.step("vt 512", 4)
    progress.close()
    assert "vt 512" in stream.getvalue()
    assert "4/4" in stream.getvalue()
