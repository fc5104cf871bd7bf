"""Bins, groups and shares; and the way over the wire, where a map may be anything."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.kept_map import (
    ALL,
    MAX_BINS,
    MAX_GROUPS,
    KeptMap,
    bin_width,
    group_of,
    num_bins,
    num_groups,
    share_bytes,
)
from packlight.core.shipping import Shipped
from packlight.core.types import Finished, FinishReason, KVUsage, Usage
from packlight.wire import events
from packlight.wire.frames import event_from_bytes, event_to_bytes
from packlight.wire.v1 import decode_pb2

MAP = KeptMap(5, 3, 2, (5.0, 2.5, 1.0), bytes([255, 255, 255, 255, 0, 128, 0, 0, 1]))


@given(st.integers(1, 2_000_000))
def test_bins_cover_the_prompt_and_are_as_narrow_as_may_be(num_tokens):
    width = bin_width(num_tokens)
    count = num_bins(num_tokens, width)
    assert count <= MAX_BINS
    assert (count - 1) * width < num_tokens <= count * width
    assert width == 1 or num_bins(num_tokens, width - 1) > MAX_BINS


@given(st.integers(1, 200))
def test_groups_are_consecutive_layers_of_about_equal_number(num_layers):
    kept = KeptMap(1, num_layers, 1, (1.0,) * num_groups(num_layers), bytes(num_groups(num_layers)))
    ranges = [kept.layers(group) for group in range(kept.num_groups)]
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))
    assert len(ranges) == min(num_layers, MAX_GROUPS)
    assert {group_of(layer, num_layers) for layers in ranges[:1] for layer in layers} == {0}
    assert all(group_of(layer, num_layers) == group for group, layers in enumerate(ranges) for layer in layers)
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(1, 10**6), st.data())
def test_only_nothing_is_0_and_only_all_is_255(total, data):
    count = data.draw(st.integers(0, total))
    (byte,) = share_bytes([count], [total])
    assert (byte == 0) == (count == 0)
    assert (byte == ALL) == (count == total)
    assert abs(byte / ALL - count / total) <= 1 / ALL


def test_rows_of_a_map():
    assert (MAP.num_groups, MAP.num_bins, MAP.is_whole) == (3, 3, True)
    assert [list(MAP.row(group)) for group in range(3)] == [[255, 255, 255], [255, 0, 128], [0, 0, 1]]
    assert [list(MAP.layers(group)) for group in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("kept_map", [None, MAP])
def test_it_travels_with_a_shipment_and_with_an_answer(kept_map):
    shipped = Shipped(30, 100, 1000, 12.5, None, 0.1, 0.2, 0.3, kept_map=kept_map)
    assert event_from_bytes(event_to_bytes(shipped)) == shipped
    finished = Finished("r", FinishReason.STOP, Usage(5, 0, 1, KVUsage("snapkv", kept_map=kept_map)))
    assert _over_the_wire(finished) == finished


@pytest.mark.parametrize(
    "fault",
    [
        {"bin_tokens": 0},
        {"bin_tokens": 3},
        {"num_tokens": 0},
        {"num_tokens": 70},
        {"num_layers": 2},
        {"num_kept_tokens": ()},
        {"shares": MAP.shares[1:]},
    ],
    ids=str,
)
def test_a_map_whose_parts_do_not_fit_is_left_out(fault):
    usage = Usage(5, 0, 1, KVUsage("snapkv", 2.5, kept_map=replace(MAP, **fault)))
    arrived = _over_the_wire(Finished("r", FinishReason.STOP, usage))
    assert arrived.usage.kv == KVUsage("snapkv", 2.5)


def _over_the_wire(event):
    return events.event_from_proto(decode_pb2.Event.FromString(events.event_to_proto(event).SerializeToString()))
