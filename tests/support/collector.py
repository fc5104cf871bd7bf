"""A small OpenTelemetry collector: takes OTLP over real gRPC and keeps the spans."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    url: str = ""
    arrived: list[tuple[str, trace_pb2.Span]] = field(default_factory=list)
    """(service name, span), as they came."""

    def Export(self, request, context):
        for group in request.resource_spans:
            facts = {fact.key: fact.value.string_value for fact in group.resource.attributes}
            spans = [span for scope in group.scope_spans for span in scope.spans]
            self.arrived.extend((facts["service.name"], span) for span in spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def names(self, service: str) -> set[str]:
        return {span.name for name, span in self.arrived if name == service}


@contextmanager
def collector() -> Iterator[Collector]:
    server, servicer = grpc.server(ThreadPoolExecutor(max_workers=4)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(grace=None).wait()
