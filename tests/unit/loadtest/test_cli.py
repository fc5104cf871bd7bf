"""The command line: what is wrong from the start is refused with exit code 2, and said."""

from __future__ import annotations

import pytest

from loadtest.cli import main
from loadtest.scenario import FOLDER
from packlight.bench.serve.answers import Answer
from tests.unit.loadtest.made_up import answer, run_of


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--set", "prompts.kind=poem"], "prompts.kind: "),
        (["--set", "slo.tffs_s=1"], "smoke.yaml: slo.tffs_s: no such setting, allowed here: e2e_s, tpot_s, ttft_s"),
        (["--set", "duration=1"], "did you mean duration_s?"),
        (["--kv", "{"], "--kv: not valid JSON"),
        (["--body", "[]"], "--body: a JSON object is expected"),
        (["--require", "speed=1"], "must be one of goodput, found"),
        (["--max-errors", "7"], "--max-errors: got '7.0', must be a share"),
        (["--require", "goodput=1", "--set", "slo={}"], "the scenario has no slo"),
        (["--url", "localhost"], "--url localhost: a URL such as"),
        (["--json", "/no/such/folder/run.json"], "there is no such folder"),
        (["--html", "/no/such/folder/run.html"], "there is no such folder"),
        (["--scenario", "none"], "shipped are burst, "),
        (["--tokenizer", "/no/such/tokenizer"], "/no/such/tokenizer"),
        (["--api-key-from", "NO_SUCH_KEY"], "--api-key-from NO_SUCH_KEY: there is no such environment variable"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(capsys, flags, told):
    assert main(["run", "--tokenizer", "fake", *flags]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "starting" not in said


def test_the_scenarios_are_listed(capsys):
    assert main(["scenarios"]) == 0
    assert capsys.readouterr().out.count("\n") == len(list(FOLDER.glob("*.yaml")))


@pytest.fixture
def saved(tmp_path):
    """Where a run of so many answers was written."""

    def save(name: str, *answers: Answer) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(run_of(answers).to_json())
        return str(path)

    return save


def test_a_run_is_reported_on_again(capsys, saved, tmp_path):
    assert main(["report", saved("a", answer(), answer()), "--html", str(tmp_path / "a.html")]) == 0
    assert "TTFT, ms" in capsys.readouterr().out
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_two_runs_are_compared_and_what_differs_is_said(capsys, saved, tmp_path):
    page = tmp_path / "both.html"
    assert main(["compare", saved("a", answer()), saved("b", answer(), answer(1.0)), "--html", str(page)]) == 0
    said = capsys.readouterr()
    assert "b / a" in said.out
    assert "beware, the numbers of requests differ: 1 and 2" in said.err
    assert page.exists()


def test_a_run_is_not_compared_with_itself(capsys, saved):
    path = saved("a", answer())
    assert main(["compare", path, path]) == 2
    assert "cannot be compared with itself" in capsys.readouterr().err
