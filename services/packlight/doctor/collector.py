"""Where traces go: is the exporter installed, and does anybody listen at the other end."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from packlight.core.errors import ConfigError
from packlight.doctor.base import Finding, Patient, missing, ok, unused, warning
from packlight.telemetry.traces import open_traces

_PORT, _TIMEOUT_S = 4317, 2.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def check_traces(patient: Patient) -> Finding:
    """The exporter of `telemetry.traces`, and a connection to the collector. Without one, requests are served all the
    same."""
    config = patient.config.telemetry
    if config.traces == "none":
        return unused("telemetry.traces is none")
    try:
        open_traces(config).close()
    except ConfigError as error:
        return missing(error.message, "pip install 'packlight[traces]'")
    host, port = _address(config.traces_endpoint or _from(patient.environ))
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return warning(
            f"{host}:{port} cannot be reached: {reason}", "correct telemetry.traces_endpoint; spans are lost"
        )
    return ok(f"{host}:{port} takes connections")


def _from(environ: Mapping[str, str]) -> str:
    """What the SDK takes where the configuration says nothing."""
    return next((environ[name] for name in _ENDPOINTS if environ.get(name)), f"http://localhost:{_PORT}")


def _address(endpoint: str) -> tuple[str, int]:
    """As the exporter reads it, which may come without a scheme."""
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    return parts.hostname or endpoint, parts.port or _PORT
