"""Trace context <-> gRPC metadata, under the names that proxies and other servers know.

Foreign text: what could not be sent on is left out, so that no trace can cost a request.
"""

from __future__ import annotations

from collections.abc import Iterable

from packlight.core.trace import TraceContext

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

Metadata = tuple[tuple[str, str], ...]


def trace_to_metadata(trace: TraceContext | None) -> Metadata:
    if trace is None:
        return ()
    pairs = ((TRACEPARENT, trace.traceparent), (TRACESTATE, trace.tracestate))
    return tuple((name, value) for name, value in pairs if value and value.isascii() and value.isprintable())


def trace_from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> TraceContext | None:
    """None where there is no traceparent, or more than one: nobody could say which."""
    return trace_of((name, value) for name, value in metadata or () if isinstance(value, str))


def trace_of(headers: Iterable[tuple[str, str]]) -> TraceContext | None:
    """Of lower-case headers, HTTP's or gRPC's. Several tracestates are one list in parts (RFC 9110, section 5.3)."""
    found = [(name, value) for name, value in headers if name in (TRACEPARENT, TRACESTATE)]
    parents = [value for name, value in found if name == TRACEPARENT]
    if len(parents) != 1:
        return None
    return TraceContext(parents[0], ",".join(value for name, value in found if name == TRACESTATE))


def trace_from_fields(traceparent: str, tracestate: str) -> TraceContext | None:
    """Of a message's two fields; empty ones are absent."""
    return TraceContext(traceparent, tracestate) if traceparent else None
