"""`packlight bench serve` as a user meets it: flags, files, tables, exit codes. The server is a script."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from xml.etree import ElementTree

import httpx
import pytest

from packlight.bench.command import BENCHES
from packlight.bench.serve import command
from packlight.bench.serve.figures import MEASURES
from packlight.bench.serve.plots import sections
from packlight.bench.serve.results import load
from packlight.bench.serve.tables import ABSENT, show, tables
from packlight.bench.serve.turn import Pace
from packlight.cli import main
from packlight.report.charts import BOTTOM, LEFT, RIGHT, TOP
from tests.support.scripted_openai import Script, ScriptedServer
from tests.unit.test_bench_serve_figures import FAILED, made_up_run, turn

SMALL = ["--tokenizer", "fake", "--prompt-tokens", "300", "--max-tokens", "4"]
FAST = {"first_s": 0.002, "gap_s": 0.001}


@pytest.fixture
def bench(monkeypatch):
    """Runs the command against a script."""

    def run(script: Script, *flags: str, servers: tuple[str, ...] = ("a=http://a", "b=http://b")) -> int:
        server = ScriptedServer(script)
        monkeypatch.setattr(command, "make_http", lambda timeout_s, key: httpx.AsyncClient(transport=server))
        # Only a server that does not answer is waited for.
        monkeypatch.setattr(command, "make_pace", lambda: Pace(time.perf_counter, lambda seconds: asyncio.sleep(0)))
        rows = [word for row in servers for word in ("--server", row)]
        return main(["bench", "serve", *rows, *SMALL, *flags])

    return run


def test_a_run_and_its_files(bench, tmp_path, capsys):
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "html", "markdown")}
    flags = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    loads = ["--concurrency", "1,2", "--prompt-tokens", "250,300", "--rounds", "2", "--slo", "ttft=5,tpot=1"]
    assert bench(Script(**FAST), *loads, "--kv", 'b:{"recipe": "h2o"}', *flags) == 0
    printed = capsys.readouterr()
    run = load(files["json"])
    assert [cell.label for cell in run.cells()] == [
        f"{length} tokens, {users} at once" for length in (250, 300) for users in (1, 2)
    ]
    assert len(run.turns) == 2 * 4 * 2
    assert [server.body for server in run.header.servers] == [{}, {"kv": {"recipe": "h2o"}}]
    assert len(re.findall(r"(?m)^round [12]/2 \| .* tokens, . at once \| [ab]: TTFT ", printed.err)) == 16
    for text in (printed.out, files["markdown"].read_text()):
        assert all(word in text for word in ("300 tokens, 2 at once: ratios to a", "TPOT", "goodput, req/s"))
    html = files["html"].read_text()
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for svg in svgs:
        ElementTree.fromstring(svg)
    # Against length, TPOT, decode rate and TTFT under either load; of each cell three distributions.
    assert len(svgs) == 2 * 3 + 4 * 3
    figures = json.loads(files["json"].read_text())["figures"]["300 tokens, 1 at once"]
    assert figures["b"]["tpot_s"]["ratio"]["median"] == pytest.approx(1.0, rel=0.9)


def test_a_report_is_made_again_from_its_file(bench, tmp_path, capsys):
    path, again = tmp_path / "run.json", tmp_path / "again.md"
    assert bench(Script(**FAST), "--rounds", "1", "--json", str(path)) == 0
    first = capsys.readouterr().out
    assert main(["bench", "serve", "--from", str(path), "--markdown", str(again)]) == 0
    assert capsys.readouterr().out == first
    assert "| `TTFT, ms` |" in again.read_text()


def test_failures_are_counted_and_a_server_that_only_fails_ends_with_1(bench, capsys):
    def refuse_b(body: dict) -> None:
        script.status = 503 if body.get("top_k") == 1 else 200

    script = Script(before=refuse_b, **FAST)
    assert bench(script, "--rounds", "1", "--concurrency", "2", "--body", 'b:{"top_k": 1}') == 1
    printed = capsys.readouterr()
    assert "b: every request failed at 300 tokens, 2 at once" in printed.err
    assert re.search(r"b +300 tokens, 2 at once +2 of 2 +HTTP 503: no room", printed.out)
    assert re.search(r"(?m)^measure +a$", printed.out)
    assert "nan" not in printed.out


def test_a_run_in_which_all_fails_prints_no_figures(bench, tmp_path, capsys):
    path = tmp_path / "run.html"
    assert bench(Script(status=500), "--rounds", "1", "--html", str(path)) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("Failures (")
    assert "TTFT" not in printed
    assert "<svg" not in path.read_text()


def test_some_failures_are_no_failure_of_the_run(bench, capsys):
    answers = iter([200, 200, 500] + [200] * 50)

    def some(body: dict) -> None:
        script.status = next(answers)

    script = Script(before=some, **FAST)
    assert bench(script, "--rounds", "1", "--concurrency", "2", servers=("a=http://a",)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(?m)^failed +1$", printed)
    assert "1 of 2" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_the_rounds_that_were_over(bench, number, tmp_path, capsys):
    path, seen = tmp_path / "run.json", []

    def interrupt(body: dict) -> None:
        seen.append(body)
        if len(seen) == 4 + 3:  # two servers, each woken and asked once, in each round
            signal.raise_signal(number)

    assert bench(Script(before=interrupt, **FAST), "--rounds", "3", "--json", str(path)) == 130
    assert [turn.round for turn in load(path).turns] == [0, 0]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "300 tokens, 1 at once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "0"], ["--rate", "above 0"]),
        (["--rate", "1"], ["--requests", "--rate"]),
        (["--concurrency", "0"], ["--concurrency", "at least 1"]),
        (["--concurrency", "4", "--requests", "2"], ["--requests 2", "4"]),
        (["--rounds", "0"], ["--rounds", "0", "at least 1"]),
        (["--max-tokens", "-1"], ["--max-tokens", "-1"]),
        (["--api-key-from", "NO_SUCH_KEY"], ["--api-key-from NO_SUCH_KEY", "no such environment variable"]),
        (["--slo", "speed=1"], ["--slo speed=1", "ttft"]),
        (["--slo", "ttft=fast"], ["--slo ttft", "fast"]),
        (["--prompt-tokens", "10"], ["10 tokens", "at least"]),
        (["--workload", "shared_document", "--question-tokens", "400"], ["--question-tokens 400", "300"]),
        (["--json", "/no/such/folder/run.json"], ["/no/such/folder"]),
        (["--from", "/no/such/run.json"], ["/no/such/run.json"]),
        (["--kv", "c:{}"], ["--kv c"]),
    ],
)
def test_flags_that_make_no_run(bench, flags: list[str], words: list[str], capsys):
    assert bench(Script(**FAST), *flags) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("packlight bench: ")
    assert all(word in printed for word in words), printed


def test_open_and_closed_loop_exclude_each_other(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(Script(), "--rate", "1", "--concurrency", "1")
    assert ended.value.code == 2


def test_a_server_that_is_not_there_is_named(capsys):
    assert main(["bench", "serve", "--server", "a=http://127.0.0.1:9", *SMALL]) == 2
    assert "--server a=http://127.0.0.1:9" in capsys.readouterr().err


def test_the_list_of_benchmarks(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in BENCHES)


def test_serving_is_measured_without_torch():
    code = (
        "import sys, packlight.bench.serve.command; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(table) -> dict[str, tuple[str, ...]]:
    return {name: cells for name, *cells in table.rows}


def test_a_cell_is_the_median_with_its_range():
    figures, ratios, work = tables(made_up_run())
    assert figures.columns == ("measure", "a", "b")
    # By hand: of each turn's two answers one is steady at 1 (or 2) s, the other was due at 1 and began at 2.
    assert cells_of(figures)["TTFT, ms"] == ["1000 (1000 - 1000)", "1500 (1500 - 1500)"]
    assert cells_of(ratios)["TTFT"] == ["1.5 (1.5 - 1.5)"]
    assert cells_of(figures)["found, %"] == ["100 (100 - 100)"] * 2
    assert cells_of(figures)["failed"] == ["0", "0"]
    assert cells_of(work)["recipe"] == ["snapkv", "snapkv"]
    assert cells_of(work)["MB exact"] == ["8", "8"]
    assert "cached tokens" not in cells_of(work)


def test_a_round_that_failed_takes_no_part():
    run = made_up_run()
    run = replace(run, turns=(*run.turns[:-1], turn(FAILED, server="b", index=2)))
    figures, ratios, _, failures = tables(run)
    assert cells_of(figures)["failed"] == ["0", "1"]
    assert cells_of(ratios)["gauge peak"] == ["2 (2 - 2)"]
    assert failures.rows == (("b", "100 tokens, some", "1 of 5", "HTTP 503: no worker"),)


def test_plots_show_every_figure_inside_their_frames():
    run = made_up_run()
    longer = tuple(replace(turn, prompt_tokens=400) for turn in run.turns)
    by_length, *distributions = sections(replace(run, turns=run.turns + longer))
    assert [chart.title for chart in by_length.charts] == [
        "TPOT, ms (some)",
        "output, all decoding, tok/s (some)",
        "TTFT, ms (some)",
    ]
    assert [section.title for section in distributions] == ["100 tokens, some", "400 tokens, some"]
    for section in (by_length, *distributions):
        for chart in section.charts:
            # The answers of `a` are never decoded both at once.
            assert {line.label for line in chart.lines} == ({"b"} if "all decoding" in chart.title else {"a", "b"})
            for mark in (mark for line in chart.lines for mark in line.marks):
                assert LEFT <= mark.x <= RIGHT + 1e-6
                assert TOP - 1e-6 <= mark.y <= BOTTOM + 1e-6
    ends = {line.label: line.marks[-1] for line in by_length.charts[2].lines}
    assert ends["b"].y < ends["a"].y
    assert ends["a"].text == "a, 400 tokens: 1000 ms, 1000 to 1000"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (0.12345, "0.123"), (9.999, "10"), (12345.6, "12346"), (100.4, "100")]
)
def test_three_digits(value: float, shown: str):
    assert show(value) == shown


def test_measures_have_names_of_their_own():
    assert len({measure.key for measure in MEASURES}) == len({measure.title for measure in MEASURES}) == len(MEASURES)
    assert ABSENT == "-"
