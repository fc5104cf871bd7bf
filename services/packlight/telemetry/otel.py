"""Spans by the OpenTelemetry SDK, sent by OTLP over gRPC from a thread of its own.

Knows the SDK, from the extra `traces`. A collector that is slow or away costs spans, never a request: what does not fit
into the SDK's queue is dropped.

From the environment comes what the SDK and its exporter read there themselves: headers and certificates
(`OTEL_EXPORTER_OTLP_HEADERS`, `_CERTIFICATE`), more about the place (`OTEL_RESOURCE_ATTRIBUTES`), the size of batches
(`OTEL_BSP_*`), limits of a span (`OTEL_SPAN_*`). Whether, where to and how many is the configuration's to say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as SdkTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from packlight import __version__
from packlight.core.config import TelemetryConfig
from packlight.core.trace import TraceContext
from packlight.telemetry.traces import FLUSH_S, Attributes, Kind, Moment, SpanError

Clock = Callable[[], float]

_KINDS = {Kind.INTERNAL: SpanKind.INTERNAL, Kind.CLIENT: SpanKind.CLIENT, Kind.SERVER: SpanKind.SERVER}
_W3C = TraceContextTextMapPropagator()


class OtlpTraces:
    """One exporter and one queue for all parts of a process. `close` it in the end."""

    def __init__(self, config: TelemetryConfig) -> None:
        self._ratio = config.traces_sample_ratio
        self._exporter = OTLPSpanExporter(endpoint=config.traces_endpoint)
        self._processor = BatchSpanProcessor(self._exporter)

    def tracer(self, part: str, instance: str) -> OtelTracer:
        return OtelTracer(part, instance, self._processor, ratio=self._ratio)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        # The SDK's own shutdown waits for 30 s. An exporter that was shut down refuses batches, which ends the wait.
        giving_up = threading.Timer(timeout_s, self._exporter.shutdown)
        giving_up.daemon = True
        giving_up.start()
        self._processor.shutdown()  # type: ignore[no-untyped-call]
        giving_up.cancel()


class OtelTracer:
    """A trace that comes from elsewhere is recorded if its caller says so, one that begins here by chance of `ratio`.

    `clock` is that of everybody who tells times."""

    def __init__(
        self, part: str, instance: str, processor: SpanProcessor, *, ratio: float = 1.0, clock: Clock = time.monotonic
    ) -> None:
        resource = {
            "service.name": f"packlight-{part}",
            "service.namespace": "packlight",
            "service.instance.id": instance,
            "service.version": __version__,
        }
        sampler = ParentBased(TraceIdRatioBased(ratio))
        provider = TracerProvider(sampler, Resource.create(resource), shutdown_on_exit=False)
        provider.add_span_processor(processor)
        self._tracer, self._clock = provider.get_tracer("packlight", __version__), clock

    def start(self, name: str, parent: TraceContext | None = None, *, kind: Kind = Kind.INTERNAL) -> OtelSpan:
        now_s, now_ns = self._clock(), time.time_ns()
        context = Context() if parent is None else _context_of(parent)
        span = self._tracer.start_span(name, context, _KINDS[kind], start_time=now_ns, record_exception=False)
        return OtelSpan(self._tracer, span, self._clock, now_ns - round(1e9 * now_s))


class OtelSpan:
    """`epoch_ns` is when the clock was 0, in nanoseconds since 1970: a span and its children share it, so that a wall
    clock that is set meanwhile does not tear them apart."""

    def __init__(self, tracer: SdkTracer, span: SdkSpan, clock: Clock, epoch_ns: int) -> None:
        self._tracer, self._span, self._clock, self._epoch_ns = tracer, span, clock, epoch_ns

    @property
    def is_recording(self) -> bool:
        return self._span.is_recording()

    @property
    def context(self) -> TraceContext | None:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._span, Context()))
        if not carrier:
            return None
        return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_given(attributes))

    def moment(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, _given(attributes), self._ns(self._clock()))

    def child(
        self,
        name: str,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        moments: Sequence[Moment] = (),
    ) -> None:
        if not self.is_recording:
            return
        inside = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, inside, attributes=_given(attributes), start_time=self._ns(start_s))
        for moment in moments:
            span.add_event(moment.name, _given(moment.attributes), self._ns(moment.at_s))
        span.end(self._ns(max(start_s, end_s)))

    def end(self, error: SpanError | None = None) -> None:
        if not self.is_recording:
            return
        if error is not None:
            self._span.set_attribute("error.type", error.kind)
            if error.is_fault:
                self._span.set_status(Status(StatusCode.ERROR, error.message or None))
        self._span.end(self._ns(self._clock()))

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + round(1e9 * at_s)


def _context_of(parent: TraceContext) -> Context:
    """Empty if `parent` is malformed."""
    carrier = {"traceparent": parent.traceparent}
    return _W3C.extract(carrier | {"tracestate": parent.tracestate} if parent.tracestate else carrier, Context())


def _given(attributes: Attributes | None) -> dict[str, str | bool | int | float | Sequence[str]]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
