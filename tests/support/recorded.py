"""Traces that stay in this process, to be looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from packlight.telemetry.otel import OtelTracer


class Recorded:
    """A `Traces` whose ended spans are `spans`, in the order in which they ended."""

    def __init__(self, ratio: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._exporter, self._ratio, self._clock = InMemorySpanExporter(), ratio, clock

    def tracer(self, part: str, instance: str) -> OtelTracer:
        return OtelTracer(part, instance, SimpleSpanProcessor(self._exporter), ratio=self._ratio, clock=self._clock)

    def close(self, timeout_s: float = 0.0) -> None: ...

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.all(name)
        return span

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def paths(self) -> list[str]:
        """Every span as the names from the root down to it, ordered by when they began."""
        by_id = {span.context.span_id: span for span in self.spans}

        def path(span: ReadableSpan) -> str:
            above = by_id.get(span.parent.span_id) if span.parent else None
            return f"{path(above)}/{span.name}" if above else span.name

        return [path(span) for span in sorted(self.spans, key=lambda span: span.start_time)]


def part_of(span: ReadableSpan) -> tuple[str, str]:
    """(service, instance)."""
    resource: Mapping[str, Any] = span.resource.attributes
    return resource["service.name"], resource["service.instance.id"]
