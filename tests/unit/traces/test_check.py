"""What `packlight doctor` says of traces."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from packlight.core.config_tree import build_config
from packlight.doctor.base import Finding, Level, Patient
from packlight.doctor.collector import check_traces


def found(*settings: str, **environ: str) -> Finding:
    return check_traces(Patient("router", build_config({}, list(settings)), environ, Path("/")))


def test_nothing_is_needed_where_nothing_is_sent():
    assert found().level is Level.UNUSED


def test_a_missing_exporter_stops_the_role(monkeypatch):
    monkeypatch.setitem(sys.modules, "packlight.telemetry.otel", None)
    finding = found("telemetry.traces=otlp")
    assert finding.level is Level.MISSING
    assert "packlight[traces]" in finding.fix


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_collector_that_is_there_and_not(by_environment):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        settings = [] if by_environment else [f"telemetry.traces_endpoint=http://{place}"]
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{place}"} if by_environment else {}
        there = found("telemetry.traces=otlp", *settings, **environ)
    gone = found("telemetry.traces=otlp", *settings, **environ)
    assert (there.level, gone.level) == (Level.OK, Level.WARNING)
    assert place in there.found
    assert place in gone.found
