"""A trace's context on the wire: as fields of a message, as gRPC metadata, and what becomes of foreign text."""

from __future__ import annotations

import pytest

from packlight.core.trace import TraceContext
from packlight.wire.requests import generate_from_proto, generate_to_proto
from packlight.wire.trace import trace_from_metadata, trace_to_metadata
from packlight.wire.v1 import decode_pb2
from tests.support.fake_pair import make_request

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("trace", [TraceContext(PARENT, "a=1,b=2"), TraceContext(PARENT), None])
def test_it_survives_both_ways(trace):
    assert trace_from_metadata(trace_to_metadata(trace)) == trace
    data = generate_to_proto(make_request([1, 2], trace=trace)).SerializeToString()
    assert generate_from_proto(decode_pb2.GenerateRequest.FromString(data)).trace == trace


def test_the_trace_id_is_what_logs_show():
    assert TraceContext(PARENT).trace_id == "0af7651916cd43dd8448eb211c80319c"


def test_states_in_several_headers_are_one_list():
    metadata = (("tracestate", "a=1"), ("other", "x"), ("traceparent", PARENT), ("tracestate", "b=2"))
    assert trace_from_metadata(metadata) == TraceContext(PARENT, "a=1,b=2")


@pytest.mark.parametrize("metadata", [None, (), (("tracestate", "a=1"),), (("traceparent", PARENT),) * 2])
def test_no_parent_or_two_are_none(metadata):
    assert trace_from_metadata(metadata) is None


@pytest.mark.parametrize("text", ["ü", "a\nb", "\x00"])
def test_what_grpc_would_refuse_is_left_out(text):
    assert trace_to_metadata(TraceContext(text, text)) == ()
    assert trace_to_metadata(TraceContext(PARENT, text)) == (("traceparent", PARENT),)
