"""Tables, pages and comparisons of runs whose figures are known."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from loadtest.report import as_page, as_text, compared_as_page, compared_as_text, differences
from loadtest.results import LoadRun, load_run
from loadtest.summary import figures
from packlight.core.errors import ConfigError
from tests.unit.loadtest.made_up import KV, answer, failure, plain, run_of

RUN = run_of([answer(due_s=at, ttft_s=0.5 + 0.01 * at) for at in range(10)])


def row(text: str, name: str) -> list[str]:
    (line,) = re.findall(rf"(?m)^{re.escape(name)}  +(.*)$", text)
    return line.split()


def test_percentiles_that_are_not_there_are_dashes_beside_their_count():
    text = as_text(RUN)
    assert row(text, "TTFT, ms") == ["540", "580", "-", "590", "10"]
    assert row(text, "ITL, ms")[-1] == "40"
    assert row(as_text(run_of([failure()])), "TTFT, ms") == ["-", "-", "-", "-", "0"]


def test_packing_stands_beside_latency():
    text, page = as_text(RUN), as_page(RUN)
    assert row(text, "KV bytes shipped, % of exact") == ["30"]
    assert row(text, "prompt tokens found in a cache, %") == ["40"]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles[:4] == [
        "TTFT, ms",
        "KV bytes shipped, % of exact",
        "TPOT, ms",
        "prompt tokens found in a cache, %",
    ]
    assert {"requests in flight", "requests decoding", "output tokens per s"} <= set(titles)


def test_a_server_that_says_nothing_of_packing_has_dashes_and_no_such_plots():
    run = run_of([plain(), plain(1.0)])
    assert row(as_text(run), "KV bytes shipped, % of exact") == ["-"]
    assert "<figcaption>KV bytes shipped" not in as_page(run)
    assert "<figcaption>TTFT, ms" in as_page(run)


def test_the_page_needs_nothing_else():
    page = as_page(RUN)
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", page)
    assert not re.search(r"\b(src|href)=", page)


def test_failures_are_listed_by_how_many():
    run = run_of([failure(), failure(error="TimeoutError: timed out"), failure(), answer()])
    text = as_text(run)
    assert row(text, "HTTP 500: no room") == ["2", "of", "4"]
    assert row(text, "TimeoutError: timed out") == ["1", "of", "4"]
    assert "HTTP 500: no room" in as_page(run)


def test_a_load_that_was_not_open_says_so():
    page = as_page(run_of([answer(sent_s=0.4), answer()], waits=[0.4]))
    assert "1 conversations were due while all 4 slots were taken, and waited up to 0.4 s" in page
    assert "all 10 requests had one of 4 slots when they were due" in as_page(RUN)


def test_markup_in_what_a_server_says_is_text():
    assert "<script>" not in as_page(run_of([failure(error="<script>alert(1)</script>")]))


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────

PACKED = KV | {"shipped_bytes": 60}
OTHER = run_of([answer(due_s=at, ttft_s=0.25 + 0.005 * at, kv=PACKED) for at in range(10)])


def test_two_runs_side_by_side():
    text = compared_as_text({"full": RUN, "packed": OTHER})
    assert row(text, "TTFT p50, ms") == ["540", "270", "0.5"]
    assert row(text, "KV bytes shipped, % of exact") == ["30", "6", "0.2"]
    assert not re.search(r"(?m)^TTFT p99", text)


def test_their_page_draws_both():
    page = compared_as_page({"full": RUN, "packed": OTHER})
    labels = set(re.findall(r">(full \w+|packed \w+)</text>", page))
    assert {"full median", "packed median", "full slowest", "packed slowest"} <= labels
    assert "beware" not in page
    assert page.count("<dt>seed</dt>") == 1


def test_loads_that_differ_are_told():
    other = run_of([answer()], settings={"about": "another"})
    assert [line.partition(":")[0] for line in differences(RUN, other)] == [
        "the scenarios differ",
        "the numbers of requests differ",
    ]
    assert "the scenarios differ" in compared_as_page({"a": RUN, "b": other})


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_survives_its_file(tmp_path):
    run = replace(run_of([answer(), failure(1.0)]), figures={})
    path = tmp_path / "run.json"
    path.write_text(replace(run, figures=figures(run)).to_json())
    read = load_run(path)
    assert isinstance(read, LoadRun)
    assert read.samples == run.samples
    assert read.figures == figures(run)
    assert as_text(read) == as_text(run)


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON"])
def test_a_file_that_is_no_run_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: .*it must be what `run --json` of this version wrote"):
        load_run(path)
