"""`packlight bench serve` against `packlight serve`, both as real processes, over a model made of arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from packlight.bench.serve.results import Run, load
from tests.support.cluster import SMALL_POOLS, eventually, packlight, running_process

pytestmark = pytest.mark.e2e
NUM_TOKENS = 12
WATCHED_TOKENS = 100  # an answer lasts until somebody has looked at the pages it holds


@pytest.fixture(scope="module")
def url():
    settings = ("prefill.attention=reference", "decode.attention=reference", *SMALL_POOLS)  # nothing to compile
    with running_process(packlight("serve", "model.path=fake", "router.port=0", *settings)) as process:
        yield process.wait_for(r"ready: \S+ at (http://\S+)/v1")[1]


def bench(url: str, tmp_path, *flags: str, num_tokens: int = NUM_TOKENS) -> tuple[Run, str]:
    path = tmp_path / "run.json"
    servers = ["--server", f"full={url}", "--server", f"packed={url}/v1"]
    kv = ["--kv", 'full:{"recipe": "none"}', "--kv", 'packed:{"recipe": "streaming_llm", "ratio": 0.125}']
    sizes = ["--tokenizer", "fake", "--max-tokens", str(num_tokens), "--rounds", "2"]
    command = [sys.executable, "-m", "packlight", "bench", "serve", *servers, *kv, *sizes, "--json", str(path), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    return load(path), ended.stdout


def test_two_recipes_side_by_side(url, tmp_path):
    watched = ["--metrics", f"full={url}/metrics", "--metrics", f"packed={url}/metrics"]
    flags = ["--workload", "long_document", "--prompt-tokens", "1000,2000", "--concurrency", "3", *watched]
    run, printed = bench(url, tmp_path, *flags, num_tokens=WATCHED_TOKENS)
    assert len(run.turns) == 2 * 2 * 2
    answers = {
        name: [a for turn in run.turns if turn.server == name for a in turn.answers] for name in ("full", "packed")
    }
    for name, recipe in (("full", "none"), ("packed", "streaming_llm")):
        assert len(answers[name]) == 2 * 2 * 3
        for answer in answers[name]:
            assert (answer.error, answer.num_output_tokens, answer.kv["recipe"]) == (None, WATCHED_TOKENS, recipe)
            assert 0 < answer.ttft_s <= answer.e2e_s
            assert answer.num_cached_tokens == 0
        assert {answer.num_prompt_tokens for answer in answers[name]} == {1000, 2000}
    pages = {name: max(turn.peak for turn in run.turns if turn.server == name) for name in ("full", "packed")}
    assert pages["packed"] < pages["full"] / 4
    assert re.search(r"(?m)^KV shipped +0\.1\d", printed)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_shared_document_is_cached_after_its_first_question(url, tmp_path, api):
    sizes = ["--prompt-tokens", "1500", "--question-tokens", "300", "--requests", "4"]
    run, _ = bench(url, tmp_path, "--workload", "shared_document", "--api", api, *sizes)
    for turn in run.turns:
        first, *others = turn.answers
        assert (first.error, first.num_cached_tokens) == (None, 0)
        assert all(other.num_cached_tokens >= 1100 for other in others)


def test_later_turns_find_the_conversation_in_the_cache(url, tmp_path):
    sizes = ["--workload", "multi_turn", "--prompt-tokens", "800", "--question-tokens", "300", "--turns", "3"]
    run, _ = bench(url, tmp_path, *sizes)
    for turn in run.turns:
        assert [answer.error for answer in turn.answers] == [None] * 3
        lengths = [answer.num_prompt_tokens for answer in turn.answers]
        assert lengths == sorted(lengths)
        assert all(answer.num_cached_tokens >= 700 for answer in turn.answers[1:])


def test_open_loop(url, tmp_path):
    run, printed = bench(url, tmp_path, "--rate", "40", "--requests", "8", "--slo", "ttft=30,tpot=30")
    assert all(len(turn.answers) == 8 for turn in run.turns)
    assert len({answer.due_s for answer in run.turns[0].answers}) == 8
    assert re.search(r"(?m)^in SLO, % +100 ", printed)


@pytest.fixture
def asleep():
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_an_interrupted_run_leaves_whole_rounds_and_nobody_paused(url, tmp_path, asleep):
    path = tmp_path / "run.json"
    servers = ["--server", f"a={url}", "--server", "b=http://127.0.0.1:9", "--model", "b=none", "--pid", f"b={asleep}"]
    flags = [*servers, "--tokenizer", "fake", "--prompt-tokens", "300", "--rounds", "5000", "--json", str(path)]
    with running_process([sys.executable, "-m", "packlight", "bench", "serve", *flags]) as process:
        process.wait_for("round 2/5000 .* b: ")
        eventually(lambda: state_of(asleep) == "T")
        assert process.end(timeout_s=90) == 130
        assert [(turn.server, turn.round) for turn in load(path).turns][:2] == [("a", 0), ("b", 0)]
        assert "TTFT, ms" in process.output
    eventually(lambda: state_of(asleep) == "S")  # it was told to go on, and does so once it gets a core


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
