"""What goes between processes: samples, metrics pages, and answers read off the wire."""

from __future__ import annotations

import pytest

from loadtest.results import Scrape
from loadtest.samples import Sample, SampleFile, read_samples
from loadtest.scrape import WATCHED, Scraper, read_metrics
from loadtest.target import check_url
from packlight.bench.serve.stream import Reading, describe_refusal, to_answer
from packlight.core.errors import ConfigError
from packlight.telemetry.catalogue import CATALOGUE, Kind, full_name
from tests.unit.loadtest.made_up import answer, failure

FIRST = Sample(conversation=0, turn=0, slot_wait_s=0.0, answer=answer())
SECOND = Sample(conversation=0, turn=1, slot_wait_s=0.0, answer=failure(3.0))
THIRD = Sample(conversation=1, turn=0, slot_wait_s=0.5, answer=answer(1.0))


def test_samples_come_back_in_the_order_of_the_plan(tmp_path):
    file = SampleFile(tmp_path / "samples")
    file.begin(1000.0)
    for sample in (THIRD, FIRST, SECOND):
        file.add(sample.to_message())
    assert read_samples(tmp_path / "samples") == (1000.0, (FIRST, SECOND, THIRD))


def test_a_test_that_begins_anew_forgets_the_one_before(tmp_path):
    file = SampleFile(tmp_path / "samples")
    file.begin(1000.0)
    file.add(FIRST.to_message())
    file.begin(2000.0)
    file.add(THIRD.to_message())
    assert read_samples(tmp_path / "samples") == (2000.0, (THIRD,))


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    path = tmp_path / "samples"
    file = SampleFile(path)
    file.begin(1000.0)
    file.add(FIRST.to_message())
    path.write_text(path.read_text() + '{"conversation": 1, "tur')
    assert read_samples(path) == (1000.0, (FIRST,))


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGE = """# HELP packlight_decode_pages KV pages by state.
# TYPE packlight_decode_pages gauge
packlight_decode_pages{state="free"} 90.0
packlight_decode_pages{state="held"} 7.0
packlight_router_shipped_bytes_total{recipe="snapkv"} 1.5e+06
packlight_router_shipped_bytes_total{recipe="none"} 500000.0
packlight_router_shipped_bytes_created{recipe="none"} 1.7e+09
packlight_decode_running_requests 3.0
"""


def test_samples_of_a_metric_are_added_up_over_its_labels():
    assert read_metrics(PAGE) == {"held_pages": 7.0, "shipped_bytes": 2e6, "running": 3.0}


def test_pages_of_several_processes_are_added_up_by_the_runs_clock():
    times = iter([99.0, 101.5])
    scraper = Scraper(["a", "b", "away"], lambda: next(times), lambda url: "" if url == "away" else PAGE)
    scraper.take()
    scraper.take()
    before, during = scraper.since(100.0)
    assert (before.at_s, during) == (-1.0, Scrape(at_s=1.5, values=before.values))
    assert before.values["running"] == 6.0


def test_another_servers_page_leaves_nothing():
    scraper = Scraper(["a"], lambda: 0.0, lambda url: "other_metric 3\n")
    scraper.take()
    assert scraper.since(0.0) == ()


def test_every_watched_metric_is_in_the_catalogue():
    known = {
        full_name(role, metric) + ("_total" if metric.kind is Kind.COUNTER else ""): metric
        for role, metrics in CATALOGUE.items()
        for metric in metrics
    }
    for watched in WATCHED:
        metric = known[watched.metric]
        assert watched.is_counter == (metric.kind is Kind.COUNTER)
        assert watched.label.partition("=")[0] in ("", *metric.labels)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_counted_by_usage_and_cached_ones_too():
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
        "kv": {"kept_tokens": 2},
    }
    reading = Reading(event_s=[1.0, 2.0], end_s=2.0, text="the 42", usage=usage)
    found = to_answer(reading, 0.5, 0.75, is_follow_up=True, references=("42",))
    assert (found.num_prompt_tokens, found.num_cached_tokens, found.num_output_tokens) == (9, 4, 3)
    assert (found.ttft_s, found.tpot_s, found.found, found.counted_by) == (0.5, 0.5, True, "usage")


def test_without_usage_somebody_else_must_count():
    found = to_answer(Reading(event_s=[1.0], end_s=1.0, text="a b"), 0, 0, is_follow_up=False, references=())
    assert (found.num_output_tokens, found.counted_by, found.kv, found.found) == (0, "tokenizer", None, None)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": {"message": "no room"}}', "no room"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b'["odd"]', "['odd']"),
    ],
)
def test_refusals_are_spelled_out(body, told):
    assert describe_refusal(body) == told


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "nonsense"])
def test_what_is_no_url(url):
    with pytest.raises(ConfigError, match=r"--url .* is expected"):
        check_url(url)


def test_urls_end_before_the_version():
    assert check_url("http://host:1/base/v1/") == "http://host:1/base"
