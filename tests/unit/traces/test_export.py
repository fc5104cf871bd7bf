"""The exporter: what leaves the process, when it does not, and what it costs where there is none."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import packlight
from packlight.core.config import TelemetryConfig
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError, Draining, InvalidRequest
from packlight.core.trace import TraceContext
from packlight.telemetry.otel import OtlpTraces
from packlight.telemetry.traces import NO_SPAN, NoTraces, ending, open_traces, span_error, traced
from tests.support.clock import FakeClock
from tests.support.collector import collector
from tests.support.fake_pair import make_request
from tests.support.recorded import Recorded

PARENT = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


def to(url: str) -> OtlpTraces:
    return OtlpTraces(TelemetryConfig(traces="otlp", traces_endpoint=url))


# ── with a collector ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_closing_sends_what_waits_under_the_name_of_each_part():
    with collector() as collected:
        sent = to(collected.url)
        for part in ("router", "prefill"):
            sent.tracer(part, f"{part}-0").start("work", PARENT).end()
        sent.close()
    assert [name for name, _ in collected.arrived] == ["packlight-router", "packlight-prefill"]
    assert {span.trace_id.hex() for _, span in collected.arrived} == {PARENT.trace_id}


def test_a_collector_that_is_away_bounds_the_end_of_a_process():
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, says nothing
        sent = to(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        sent.tracer("router", "router-0").start("work").end()
        started = time.monotonic()
        sent.close(timeout_s=0.2)
        assert time.monotonic() - started < 8.0


def test_spans_that_end_after_the_end_are_nobodys_problem():
    with collector() as collected:
        sent = to(collected.url)
        span = sent.tracer("decode", "decode-0").start("work")
        sent.close()
        span.child("part", 0.0, 1.0)
        span.end()
    assert collected.arrived == []


# ── times and errors ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_parts_told_afterwards_lie_where_they_were():
    clock = FakeClock(50.0)
    recorded = Recorded(clock=clock)
    span = recorded.tracer("decode", "decode-0").start("whole")
    clock.advance(3.0)
    span.child("part", 50.5, 52.0, {"one": 1, "none": None})
    span.end()
    clock.advance(1.0)
    span.end()  # the first call counts
    whole, part = recorded.one("whole"), recorded.one("part")
    assert whole.end_time - whole.start_time == 3_000_000_000
    assert (part.start_time - whole.start_time, part.end_time - whole.start_time) == (500_000_000, 2_000_000_000)
    assert dict(part.attributes) == {"one": 1}
    assert part.parent.span_id == whole.context.span_id


@pytest.mark.parametrize(
    ("error", "kind", "message", "is_fault"),
    [
        (Draining("shutting down"), "Draining", "shutting down", True),
        (InvalidRequest("too long"), "InvalidRequest", "too long", False),
        (ValueError("text of who knows whom"), "ValueError", "", True),
    ],
)
def test_what_is_told_of_an_error(error, kind, message, is_fault):
    told = span_error(error)
    assert (told.kind, told.message, told.is_fault) == (kind, message, is_fault)
    recorded = Recorded()
    with pytest.raises(type(error)), ending(recorded.tracer("router", "r").start("work")):
        raise error
    assert recorded.one("work").attributes["error.type"] == kind
    assert recorded.one("work").status.is_ok is not is_fault
    assert recorded.one("work").events == ()


# ── without ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_none_is_the_default_and_does_nothing():
    none = open_traces(build_config({}).telemetry)
    assert isinstance(none, NoTraces)
    span = none.tracer("router", "r").start("work", PARENT)
    assert span is NO_SPAN
    assert (span.is_recording, span.context) == (False, None)
    request = make_request([1, 2], trace=PARENT)
    assert traced(request, span) is request
    none.close()


def test_the_sdk_is_not_loaded_unless_asked_for():
    program = (
        "import packlight.router.server, sys; from packlight.core.config import TelemetryConfig; "
        "from packlight.telemetry.traces import open_traces; open_traces(TelemetryConfig()); "
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"


def test_only_the_exporter_knows_the_sdk():
    sources = {path: path.read_text() for path in Path(packlight.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if re.search(r"(from|import) opentelemetry", text)] == [
        "otel.py"
    ]
    assert [path.name for path, text in sources.items() if "telemetry.otel import" in text] == ["traces.py"]


def test_a_missing_exporter_is_a_wrong_setting(monkeypatch):
    monkeypatch.setitem(sys.modules, "packlight.telemetry.otel", None)
    with pytest.raises(ConfigError, match=r"packlight\[traces\]"):
        open_traces(TelemetryConfig(traces="otlp"))
    assert open_traces(TelemetryConfig()).tracer("router", "r").start("work") is NO_SPAN, "nobody asked for it"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"traces": "jaeger"}, "telemetry.traces"),
        ({"traces_endpoint": "collector:4317"}, "telemetry.traces_endpoint"),
        ({"traces_sample_ratio": 1.5}, "telemetry.traces_sample_ratio"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, said):
    with pytest.raises(ConfigError, match=said):
        build_config({"telemetry": setting})
