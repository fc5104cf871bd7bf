"""`python -m loadtest` as its users run it: Locust in its own process, against a server that keeps to a script, and
against `packlight serve` over a model made of arithmetic."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from loadtest.results import LoadRun, load_run
from tests.support.cluster import SMALL_POOLS, START_TIMEOUT_S, eventually, running_process
from tests.support.scripted_http import on_a_port
from tests.support.scripted_openai import Script, ScriptedServer

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
NUM_TOKENS, TTFT_S, TPOT_S = 6, 0.3, 0.05
LATE_S = 5.0  # what a busy machine may add to most scripted times
SMALL = ["--tokenizer", "fake", "--max-context", "4096", "--seed", "3"]
CHAT = f"""
about: a few short messages
duration_s: 2
arrivals: {{kind: steady, rate_per_s: 6, process: constant}}
prompts: {{kind: chat, prompt_tokens: 200, max_tokens: {NUM_TOKENS}}}
slo: {{ttft_s: 30, tpot_s: 30}}
drain_s: 60
"""


@pytest.fixture
def scenario(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CHAT)
    return path


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedServer, str]]:
    server = ScriptedServer(Script(first_s=TTFT_S, gap_s=TPOT_S))
    with on_a_port(server) as url:
        yield server, url


def load_test(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", *flags]
    environ = {**os.environ, **environ}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env=environ)


def run(scenario: Path, *flags: str, code: int = 0) -> tuple[LoadRun, subprocess.CompletedProcess[str]]:
    path = scenario.with_name("run.json")
    ended = load_test("run", "--scenario", str(scenario), *SMALL, "--json", str(path), *flags)
    assert ended.returncode == code, ended.stderr
    return load_run(path), ended


# ── against a script ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_times_are_those_of_the_wire(scenario, scripted):
    """TTFT ends with the first event that has text: one with the role comes at once. Whoever is paused sees several
    events at once, so what is true of each answer is little."""
    server, url = scripted
    found, ended = run(scenario, "--url", f"{url}/v1/")
    assert len(found.samples) == len(server.bodies) - 1 == 12  # one request woke the server
    for sample, due_s in zip(found.samples, range(12), strict=True):
        answer = sample.answer
        assert answer.due_s == pytest.approx(due_s / 6, abs=1e-6)
        assert (answer.error, answer.num_output_tokens, len(answer.event_s)) == (None, NUM_TOKENS, NUM_TOKENS)
        assert answer.ttft_s >= TTFT_S
    answers = [sample.answer for sample in found.samples]
    assert median(answer.ttft_s for answer in answers) < TTFT_S + LATE_S
    assert 0.9 * TPOT_S <= median(answer.tpot_s for answer in answers) < TPOT_S + LATE_S
    assert median(answer.e2e_s - answer.ttft_s for answer in answers) >= 4 * TPOT_S
    assert found.figures["num_late"] <= 6, "there were slots for all; only the first second may have been slept through"
    assert server.most_running > 1, "requests came although others were unanswered"
    assert {body["model"] for body in server.bodies} == {"scripted"}
    assert re.search(r"(?m)^KV bytes shipped, % of exact +-$", ended.stdout)


def test_one_slot_is_no_open_load_and_the_report_says_so(scenario, scripted):
    """Each answer takes over half a second and another one is due every sixth: all but the first start late, and from
    when they were due the last one waits for all those before it."""
    server, url = scripted
    page = scenario.with_name("run.html")
    found, ended = run(scenario, "--url", url, "--set", "max_in_flight=1", "--html", str(page))
    assert server.most_running == 1
    num_late = found.figures["num_late"]
    assert num_late >= 11
    answers = [sample.answer for sample in found.samples]
    takes_s = TTFT_S + (NUM_TOKENS - 1) * TPOT_S
    assert answers[-1].ttft_s > 11 * takes_s - 11 / 6 + TTFT_S
    assert found.figures["ttft_from_sent_s"]["p50"] < 2 * takes_s
    for told in (page.read_text(), ended.stderr):
        assert f"{num_late} conversations were due while all 1 slots were taken" in told


def test_without_usage_tokens_are_counted_here(scenario, scripted):
    server, url = scripted
    server.script.has_usage = False
    found, _ = run(scenario, "--url", url)
    assert {sample.answer.num_output_tokens for sample in found.samples} == {NUM_TOKENS * len("word ")}
    assert {sample.answer.text for sample in found.samples} == {""}


def test_a_server_that_errs_is_reported_and_fails_the_run(scenario, scripted):
    server, url = scripted
    server.script.status = 500
    found, ended = run(scenario, "--url", url, "--html", str(scenario.with_name("r.html")), code=1)
    assert Counter(sample.answer.error for sample in found.samples) == {"HTTP 500: no room": 12}
    assert found.figures["ttft_s"] == {"num": 0}
    assert "12 of 12 requests failed" in ended.stderr
    for shown in (ended.stdout, scenario.with_name("r.html").read_text()):
        assert "HTTP 500: no room" in shown
        assert "nan" not in shown.lower().replace("tenant", "")


def test_errors_may_be_allowed_and_goodput_required(scenario, scripted):
    """Every third answer is cut off."""
    server, url = scripted
    server.script.before = lambda body: setattr(
        server.script, "error_after", 2 if len(server.bodies) % 3 == 0 else None
    )
    server.script.first_s = server.script.gap_s = 0.001
    found, _ = run(scenario, "--url", url, "--max-errors", "0.5", "--require", "goodput=0.5")
    assert found.figures["num_failed"] == 4
    assert found.figures["slo_share"] == pytest.approx(8 / 12)
    _, ended = run(scenario, "--url", url, "--max-errors", "0.5", "--require", "goodput=0.9", code=1)
    assert "slo_share is 0.667, required is 0.9" in ended.stderr


def test_an_answer_that_never_comes_has_failed_when_the_run_ends(scenario, scripted):
    server, url = scripted
    server.script.before = lambda body: setattr(server.script, "first_s", 0.01 if body["max_tokens"] == 2 else 600.0)
    flags = ["--set", "drain_s=1", "--set", "duration_s=1"]
    found, _ = run(scenario, "--url", url, *flags, code=1)
    assert {sample.answer.error for sample in found.samples} == {"no whole answer before the run ended"}
    assert len(found.samples) == 6


def test_agents_come_back_with_what_was_said(scenario, scripted):
    server, url = scripted
    server.script.first_s = server.script.gap_s = 0.01
    sizes = "prompt_tokens: 800, question_tokens: 300, turns: 3, max_tokens: 4, think_s: 0.2"
    turns = f"prompts={{kind: multi_turn, {sizes}}}"
    found, _ = run(scenario, "--url", url, "--set", turns, "--set", "arrivals.rate_per_s=2")
    assert [(sample.conversation, sample.turn) for sample in found.samples] == [
        (conversation, turn) for conversation in range(4) for turn in range(3)
    ]
    asked = [[message["role"] for message in body["messages"]] for body in server.bodies[1:]]
    assert Counter(len(roles) for roles in asked) == {2: 4, 4: 4, 6: 4}
    assert {tuple(roles) for roles in asked if len(roles) == 4} == {("system", "user", "assistant", "user")}
    for before, after in zip(found.samples, found.samples[1:], strict=False):
        if after.turn:
            assert after.answer.due_s >= before.answer.last_s


def test_several_sending_processes_share_one_plan(scenario, scripted):
    server, url = scripted
    found, _ = run(scenario, "--url", url, "--processes", "2")
    assert [sample.conversation for sample in found.samples] == list(range(12))
    asked = Counter(body["messages"][-1]["content"] for body in server.bodies[1:])
    assert set(asked.values()) == {1}
    assert len(asked) == 12


def test_plain_locust_runs_the_same_and_its_csv_has_our_rows(scenario, scripted, tmp_path):
    _, url = scripted
    files = ["--csv", str(tmp_path / "own"), "--samples", str(tmp_path / "samples")]
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--host", url]
    given = ["--scenario", str(scenario), "--tokenizer", "fake", *files]
    ended = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "own_stats.csv").open() as file:
        rows = {row["Type"]: int(row["Request Count"]) for row in csv.DictReader(file)}
    assert rows == {"TTFT": 12, "TPOT": 12, "E2E": 12, "ITL": 12 * (NUM_TOKENS - 1), "": 12 * (NUM_TOKENS + 2)}


def test_an_interrupted_run_reports_what_there_is(scenario, scripted, tmp_path):
    server, url = scripted
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "loadtest", "run", "--scenario", str(scenario), *SMALL, "--url", url]
    with running_process([*command, "--set", "duration_s=500", "--json", str(path)]) as process:
        process.wait_for("3000 requests over 500 s")
        eventually(lambda: len(server.bodies) > 12)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(START_TIMEOUT_S) == 130
        found = load_run(path)
        assert 0 < len(found.samples) < 3000
        assert found.header.num_planned == 3000


def test_a_run_whose_sender_dies_is_not_taken_for_a_whole_one(scenario, scripted, tmp_path):
    server, url = scripted
    path, mark = tmp_path / "run.json", {"STARTED_BY_TEST": str(tmp_path)}
    command = [sys.executable, "-m", "loadtest", "run", "--scenario", str(scenario), *SMALL, "--url", url]
    with running_process([*command, "--set", "duration_s=500", "--json", str(path)], mark) as process:
        process.wait_for("3000 requests over 500 s")
        eventually(lambda: len(server.bodies) > 12)
        (sender,) = processes(**mark) - {str(process.popen.pid)}
        os.kill(int(sender), signal.SIGKILL)
        assert process.popen.wait(START_TIMEOUT_S) == 130
        num_lost = 3000 - len(load_run(path).samples)
        process.wait_for(f"a sending process ended before its time: nothing is known of {num_lost} conversations")


# ── what is wrong from the start ─────────────────────────────────────────────────────────────────────────────────────


def test_no_server(scenario):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ended = load_test("run", "--scenario", str(scenario), *SMALL, "--url", f"http://127.0.0.1:{port}")
    assert ended.returncode == 3
    assert f"http://127.0.0.1:{port}: no server answers" in ended.stderr


def test_a_server_that_cannot_start_says_why(scenario):
    ended = load_test("run", "--scenario", str(scenario), *SMALL, "--serve-set", "model.path=/no/such/model")
    assert ended.returncode == 3
    assert "model.path '/no/such/model': no such folder or file" in ended.stderr


# ── against Packlight ────────────────────────────────────────────────────────────────────────────────────────────────


def serve_flags() -> list[str]:
    settings = ("model.path=fake", "prefill.attention=reference", "decode.attention=reference", *SMALL_POOLS)
    return [part for setting in settings for part in ("--serve-set", setting)]


def test_the_embedded_server_with_two_recipes_side_by_side(scenario, tmp_path):
    shared = "prompts={kind: shared_document, prompt_tokens: 2000, question_tokens: 400, max_tokens: 6}"
    mark = {"STARTED_BY_TEST": str(tmp_path)}
    recipes = {"full": '{"recipe": "none"}', "packed": '{"recipe": "streaming_llm", "ratio": 0.125}'}
    paths = {name: str(tmp_path / f"{name}.json") for name in recipes}
    found = {}
    for name, kv in recipes.items():
        flags = ["--set", shared, "--json", paths[name], "--kv", kv, "--html", str(tmp_path / f"{name}.html")]
        ended = load_test("run", "--scenario", str(scenario), "--seed", "3", *serve_flags(), *flags, **mark)
        assert ended.returncode == 0, ended.stderr
        found[name] = load_run(Path(paths[name]))
    eventually(lambda: not processes(**mark))
    for name, recipe in (("full", "none"), ("packed", "streaming_llm")):
        answers = [sample.answer for sample in found[name].samples]
        assert [answer.error for answer in answers] == [None] * 12
        assert {answer.num_prompt_tokens for answer in answers} == {2000}
        assert {answer.num_output_tokens for answer in answers} == {NUM_TOKENS}
        assert {answer.kv["recipe"] for answer in answers} == {recipe}
        assert found[name].figures["cached_share"] > 0.5
        assert found[name].scrapes[-1].values["prompt_tokens"] >= 12 * 2000
    assert found["full"].figures["shipped_share"] == pytest.approx(1, abs=0.01)
    assert found["packed"].figures["shipped_share"] == pytest.approx(0.125, abs=0.03)
    page = (tmp_path / "packed.html").read_text()
    assert page.index("<figcaption>TTFT, ms") < page.index("<figcaption>KV bytes shipped") < page.index("TPOT, ms</fig")
    assert "<figcaption>decode pages held" in page

    both = tmp_path / "both.html"
    ended = load_test("compare", paths["full"], paths["packed"], "--html", str(both))
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"(?m)^KV bytes shipped, % of exact +100 +1[23]\S* +0\.1[23]", ended.stdout)
    assert "packed median" in both.read_text()
    again = load_test("report", paths["full"], "--html", str(tmp_path / "again.html"))
    assert (again.returncode, (tmp_path / "again.html").exists()) == (0, True)


def processes(**environ: str) -> set[str]:
    """Those that have these variables, and so do their children."""
    found, wanted = set(), {f"{name}={value}".encode() for name, value in environ.items()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.add(folder.name)
    return found
