"""Real processes, and a real collector that they send to: one request, one trace, flushed when they end."""

from __future__ import annotations

import httpx
import pytest

from tests.support.cluster import PATIENT, SMALL_POOLS, packlight, running_cluster, running_process
from tests.support.collector import collector

pytestmark = pytest.mark.e2e

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUESTION = {"model": "fake", "messages": [{"role": "user", "content": "a trace, please"}], "max_tokens": 8}


def settings_for(url: str) -> tuple[str, ...]:
    """Nothing is sampled but what the caller wants."""
    traced = ("telemetry.traces=otlp", f"telemetry.traces_endpoint={url}", "telemetry.traces_sample_ratio=0")
    return ("model.path=fake", *SMALL_POOLS, *PATIENT, *traced)


def ask_twice(url: str) -> None:
    """Once with the caller's trace, once without."""
    for headers in ({"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"}, {}):
        chat = f"{url}/v1/chat/completions"
        answer = httpx.post(chat, json=QUESTION, headers=headers, trust_env=False, timeout=60.0)
        assert answer.status_code == 200, answer.text


def test_spans_of_all_processes_share_the_callers_trace():
    with collector() as collected:
        flags = [flag for setting in settings_for(collected.url) for flag in ("--set", setting)]
        with running_cluster("--prefill", "1", "--decode", "1", *flags) as cluster:
            ask_twice(cluster.url)
            assert cluster.process.end() == 0
    assert {span.trace_id.hex() for _, span in collected.arrived} == {TRACE_ID}
    assert collected.names("packlight-router") == {"chat fake", "prepare", "route", "attempt"}
    assert collected.names("packlight-decode") >= {"generate", "admit", "receive", "decode"}
    assert collected.names("packlight-prefill") >= {"prefill", "queue", "compute", "ship"}
    by_name = {span.name: span for _, span in collected.arrived}
    assert by_name["chat fake"].parent_span_id.hex() == CALLER_ID
    assert by_name["generate"].parent_span_id == by_name["attempt"].span_id
    assert by_name["prefill"].parent_span_id == by_name["generate"].span_id


def test_one_process_is_three_services():
    with (
        collector() as collected,
        running_process(packlight("serve", "router.port=0", *settings_for(collected.url))) as process,
    ):
        ask_twice(process.wait_for(r"ready: fake at (\S+)/v1")[1])
        assert process.end() == 0
    assert {span.trace_id.hex() for _, span in collected.arrived} == {TRACE_ID}
    assert {name for name, _ in collected.arrived} == {"packlight-router", "packlight-prefill", "packlight-decode"}


def test_a_collector_that_is_away_costs_no_answer_and_no_more_than_seconds_at_the_end():
    with running_process(packlight("serve", "router.port=0", *settings_for("http://127.0.0.1:9"))) as process:
        ask_twice(process.wait_for(r"ready: fake at (\S+)/v1")[1])
        assert process.end(timeout_s=40.0) == 0
