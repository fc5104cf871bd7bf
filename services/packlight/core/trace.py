"""Where in a trace a request is, as it travels from process to process.

Knows the two strings of W3C Trace Context (https://www.w3.org/TR/trace-context/). Does not know who makes spans of them
(`telemetry/traces.py`) or how they cross a wire (`wire/trace.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span that asks for the work. Foreign ones may be malformed: whoever reads one then begins a trace anew."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits: what log lines carry."""
        return self.traceparent[3:35]
