"""The `Server-Timing` header says what the body says."""

from __future__ import annotations

import re

from packlight.router.server_timing import server_timing_header
from tests.support.router_harness import Harness, events_of
from tests.support.scripted_backend import End, Say

PARTS = ["prepare", "decode_queue", "prefill_queue", "prefill", "select", "transfer", "first_step"]


async def test_a_whole_answer_has_it() -> None:
    response = await Harness([Say([80]), Say([81, 82]), End()]).chat()
    timings = response.json()["usage"]["kv"]["timings_ms"]
    entries = re.findall(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+);dur=([0-9.]+)(?:, |$)", response.headers["server-timing"])
    assert [name for name, _ in entries] == PARTS == list(timings)
    assert {name: float(value) for name, value in entries} == timings


async def test_a_stream_has_it_in_its_last_chunk() -> None:
    response = await Harness([Say([80]), End()]).chat(stream=True, stream_options={"include_usage": True})
    assert "server-timing" not in response.headers
    assert list(events_of(response)[-2]["usage"]["kv"]["timings_ms"]) == PARTS


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert server_timing_header({"kv": None}) == {}
    small, large = {"kv": {"timings_ms": {"prefill": 0.001}}}, {"kv": {"timings_ms": {"prefill": 1234567.891}}}
    assert server_timing_header(small) == {"server-timing": "prefill;dur=0.001"}
    assert server_timing_header(large) == {"server-timing": "prefill;dur=1234567.891"}
