"""Traces: what a span is to those who work, and the one that costs nothing.

Knows names, times and attributes. Does not know OpenTelemetry: `telemetry/otel.py` does, and is imported only where
`telemetry.traces` asks for it. By rule a span holds ids, counts, durations and errors, never prompts or answers.

A span that somebody in another process works for is started before the work, so that its context can travel. All
others are told of afterwards, from times that the work noted anyway: a step knows nothing of traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol, TypeVar

from packlight.core.config import TelemetryConfig
from packlight.core.errors import Cancelled, ConfigError, PacklightError, RequestError
from packlight.core.trace import TraceContext
from packlight.core.types import GenerateRequest, PrefillRequest

Request = TypeVar("Request", GenerateRequest, PrefillRequest)

FLUSH_S = 3.0
"""How long the end of a process may wait for a collector."""

Value = str | bool | int | float | Sequence[str] | None
Attributes = Mapping[str, Value]
"""None is left out."""


class Kind(StrEnum):
    """Whether a span waits for another process (client), works for one (server), or neither."""

    INTERNAL = "internal"
    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened at one time in a span: an event, in OpenTelemetry's words."""

    name: str
    at_s: float
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanError:
    """What a span ended with. `kind` has few values. It is a fault unless it was the caller's doing."""

    kind: str
    message: str = ""
    is_fault: bool = True


class Span(Protocol):
    """Some work, from `Tracer.start` until `end`. Times are seconds of the tracer's clock."""

    @property
    def is_recording(self) -> bool:
        """Whether anything said of it is kept. Where not, do not take the trouble to say it."""
        ...

    @property
    def context(self) -> TraceContext | None:
        """For those who work for it, whether it is recorded or not; None if there are no traces at all."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def moment(self, name: str, attributes: Attributes | None = None) -> None:
        """Something happens now."""
        ...

    def child(
        self,
        name: str,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        moments: Sequence[Moment] = (),
    ) -> None:
        """Work that is over already, and was part of this."""
        ...

    def end(self, error: SpanError | None = None) -> None:
        """Nothing is kept of what is said later. Idempotent: the first call counts."""
        ...


class Tracer(Protocol):
    """Makes the spans of one part: the router, or one worker."""

    def start(self, name: str, parent: TraceContext | None = None, *, kind: Kind = Kind.INTERNAL) -> Span:
        """A span that begins now. Without a parent, or with one that cannot be read, it begins a trace."""
        ...


class Traces(Protocol):
    """All traces of a process."""

    def tracer(self, part: str, instance: str) -> Tracer:
        """`part` is `router`, `prefill` or `decode`; `instance` tells those of one kind apart."""
        ...

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send what waits to be sent. Blocks, for about `timeout_s` at most; never raises."""
        ...


# ── the one that costs nothing ───────────────────────────────────────────────────────────────────────────────────────


class NoSpan:
    is_recording = False
    context: TraceContext | None = None

    def set(self, attributes: Attributes) -> None: ...
    def moment(self, name: str, attributes: Attributes | None = None) -> None: ...
    def child(
        self,
        name: str,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        moments: Sequence[Moment] = (),
    ) -> None: ...
    def end(self, error: SpanError | None = None) -> None: ...


NO_SPAN: Span = NoSpan()


class NoTracer:
    def start(self, name: str, parent: TraceContext | None = None, *, kind: Kind = Kind.INTERNAL) -> Span:
        return NO_SPAN


NO_TRACER: Tracer = NoTracer()


class NoTraces:
    def tracer(self, part: str, instance: str) -> Tracer:
        return NO_TRACER

    def close(self, timeout_s: float = FLUSH_S) -> None: ...


# ── for those who work ───────────────────────────────────────────────────────────────────────────────────────────────


def open_traces(config: TelemetryConfig) -> Traces:
    """Raises ConfigError if the exporter is not installed."""
    if config.traces == "none":
        return NoTraces()
    try:
        from packlight.telemetry.otel import OtlpTraces
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"telemetry.traces is {config.traces!r}, but {error.name} is not installed: "
            "pip install 'packlight[traces]', or --set telemetry.traces=none"
        ) from None
    return OtlpTraces(config)


def traced(request: Request, span: Span) -> Request:
    """`request` as `span` passes it on. Without traces here it goes on as it came: those behind may have some."""
    trace = span.context
    return request if trace is None else replace(request, trace=trace)


@contextmanager
def ending(span: Span) -> Iterator[Span]:
    """`span` ends with the block, by the error that ends it if there is one."""
    try:
        yield span
    except Exception as error:
        span.end(span_error(error))
        raise
    finally:
        span.end()


def span_error(error: Exception) -> SpanError:
    """Our own messages repeat nothing of a request; of other errors only the class is told."""
    if not isinstance(error, PacklightError):
        return SpanError(type(error).__name__)
    return SpanError(type(error).__name__, error.message, not isinstance(error, RequestError | Cancelled))
