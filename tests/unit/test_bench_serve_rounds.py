"""Turns and rounds: when requests are sent, in which order servers are asked, what is watched meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import httpx
import pytest

from packlight.bench.serve.gauge import PeakGauge
from packlight.bench.serve.loads import Load, arrivals
from packlight.bench.serve.pause import paused
from packlight.bench.serve.prompts import Prompts
from packlight.bench.serve.results import Turn
from packlight.bench.serve.rounds import Plan, Row, take_turns
from packlight.bench.serve.targets import Target
from packlight.bench.serve.turn import Pace
from packlight.bench.serve.workloads import WORKLOADS, Size
from packlight.models.fake_spec import FakeTokenizer
from tests.support.cluster import eventually
from tests.support.scripted_openai import Script, ScriptedServer, run_in_virtual_time, virtual_clock

NUM_TOKENS = 5


def run(script: Script, *targets: Target, workload: str = "chat", **fields) -> tuple[list[Turn], ScriptedServer]:
    """All turns, each target being the same scripted server."""
    server = ScriptedServer(script)
    rows = tuple(Row(target, "scripted") for target in targets or [Target("a", "http://a")])
    cells = fields.pop("cells", ((Size(600, 4, 200, 2), Load(concurrency=2)),))
    known = {"num_rounds": 1, "max_tokens": NUM_TOKENS, "seed": 0, "prefill_first": False}
    plan = Plan(rows=rows, workload=WORKLOADS[workload], cells=cells, gauge='pages{state="held"}', **(known | fields))

    async def main() -> list[Turn]:
        async with httpx.AsyncClient(transport=server) as http:
            pace = Pace(virtual_clock, asyncio.sleep)
            return [turn async for turn in take_turns(plan, Prompts(FakeTokenizer(), "completions"), http, pace)]

    return run_in_virtual_time(main()), server


def measured(server: ScriptedServer) -> list[str]:
    """The prompts that counted."""
    return [body["prompt"] for body in server.bodies if body["max_tokens"] == NUM_TOKENS]


def test_closed_loop_keeps_as_many_at_work_as_asked() -> None:
    (turn,), server = run(Script(first_s=1.0, gap_s=0.25))
    assert server.most_running == 2
    assert sorted(answer.sent_s for answer in turn.answers) == [0.0, 0.0, 2.0, 2.0]
    assert all(answer.due_s == answer.sent_s for answer in turn.answers)
    assert all((answer.ttft_s, answer.tpot_s) == pytest.approx((1.0, 0.25)) for answer in turn.answers)


def test_open_loop_sends_when_due_whatever_is_running() -> None:
    cells = ((Size(400, 6, 200, 1), Load(rate=2.0)),)
    (turn,), server = run(Script(first_s=30.0), cells=cells)
    assert server.most_running == 6
    assert sorted(answer.due_s for answer in turn.answers) == pytest.approx(
        arrivals(2.0, 6, "0/0/400/2 per s/0"), abs=1e-6
    )
    assert all(answer.sent_s == pytest.approx(answer.due_s, abs=2e-6) for answer in turn.answers)
    assert turn.concurrency is None


def test_arrivals_are_as_many_a_second_as_asked_and_seeded() -> None:
    times = arrivals(4.0, 2000, "a")
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0.0
    assert mean(gaps) == pytest.approx(1 / 4, rel=0.1)
    assert mean(gap * gap for gap in gaps) == pytest.approx(2 / 16, rel=0.25)  # exponential: its second moment
    assert times == arrivals(4.0, 2000, "a") != arrivals(4.0, 2000, "b")


def test_servers_take_turns_in_rotating_order_and_never_at_once() -> None:
    targets = [Target(name, f"http://{name}") for name in "abc"]
    turns, server = run(Script(), *targets, num_rounds=4)
    order = ["".join(turn.server for turn in turns if turn.round == index) for index in range(4)]
    assert order == ["abc", "bca", "cab", "abc"]
    assert server.most_running == 2


def test_every_length_is_run_under_every_load() -> None:
    cells = tuple((Size(length, 2, 100, 1), load) for length in (300, 400) for load in (Load(concurrency=1), Load(2)))
    turns, _ = run(Script(), cells=cells)
    assert [turn.cell.label for turn in turns] == [
        "300 tokens, 1 at once",
        "300 tokens, 2 at once",
        "400 tokens, 1 at once",
        "400 tokens, 2 at once",
    ]


def test_servers_are_asked_the_same_and_rows_of_one_server_are_not() -> None:
    targets = [Target("a", "http://a"), Target("b", "http://b"), Target("b packed", "http://b")]
    _, server = run(Script(), *targets, num_rounds=2)
    first, second = measured(server)[:12], measured(server)[12:]
    assert first[:4] == first[4:8]
    assert not set(first[4:8]) & set(first[8:])
    assert not set(first) & set(second)


def test_a_conversation_goes_on_with_what_was_answered() -> None:
    (turn,), server = run(Script(word="so "), workload="multi_turn")
    firsts = [prompt for prompt in measured(server) if "so so" not in prompt]
    later = [prompt for prompt in measured(server) if "so so" in prompt]
    assert (len(firsts), len(later)) == (4, 4)
    assert all(any(prompt.startswith(first + "so so so so so ") for first in firsts) for prompt in later)
    assert sorted(answer.is_follow_up for answer in turn.answers) == [False] * 4 + [True] * 4


def test_a_conversation_ends_where_it_fails() -> None:
    (turn,), _ = run(Script(error_after=1), workload="multi_turn")
    assert [answer.error for answer in turn.answers] == ["worker lost"] * 4


def test_prompts_can_be_computed_before_the_clock_starts() -> None:
    (turn,), server = run(Script(first_s=3.0), prefill_first=True)
    warmed = [body["prompt"] for body in server.bodies if body["max_tokens"] == 1]
    assert sorted(warmed) == sorted(measured(server))
    assert min(answer.sent_s for answer in turn.answers) == 0.0


def test_a_turn_begins_when_its_server_is_awake() -> None:
    tries = iter([503, 503, 200])

    def refuse(body: dict) -> None:
        script.status = next(tries, 200)

    script = Script(before=refuse)
    (turn,), server = run(script)
    assert [body["max_tokens"] for body in server.bodies[:4]] == [2, 2, 2, NUM_TOKENS]
    assert all(answer.error is None for answer in turn.answers)


def test_the_gauge_is_watched_while_the_turn_lasts() -> None:
    target = Target("a", "http://a", metrics_url="http://a/metrics")
    (turn,), server = run(Script(first_s=1.0), target)
    assert turn.peak == 14.0
    assert server.paths.count("/metrics") == pytest.approx(2.8 / 0.2, abs=3)
    assert run(Script())[0][0].peak is None


async def test_a_gauge_that_is_not_there_has_no_peak() -> None:
    replies = iter([httpx.ConnectError("not yet"), httpx.Response(200, text="other 1\n")])

    def reply(request: httpx.Request) -> httpx.Response:
        answer = next(replies)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(reply)) as http,
        PeakGauge("http://a/metrics", "pages", http, period_s=1e9) as gauge,
    ):
        pass
    assert gauge.peak is None


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
def test_others_stand_still_with_their_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        eventually(children.read_text)
        pids = [parent.pid, int(children.read_text())]
        eventually(lambda: command(pids[1]) != command(pids[0]))  # until then the parent sleeps deeper than any signal
        with paused([parent.pid, 2**22 + 1]):  # no process has this number
            eventually(lambda: [state(pid) for pid in pids] == ["T", "T"])
        eventually(lambda: all(state(pid) in "SR" for pid in pids))
    finally:
        parent.communicate(b"\n", timeout=20)


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
