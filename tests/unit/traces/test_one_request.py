"""One request, one trace: from HTTP over gRPC to both workers and back, whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest
from opentelemetry.trace import SpanKind, StatusCode

from packlight.core.config import PrefillConfig, RouterConfig
from packlight.core.errors import InternalError
from packlight.core.trace import TraceContext
from packlight.core.types import Failed, Finished, Progress
from packlight.models.fake_spec import fake_spec
from packlight.telemetry.logs import JsonLine
from tests.support.fake_pair import make_request, until
from tests.support.fleet_of_fakes import events_of, fleet_of_fakes
from tests.support.recorded import Recorded, part_of
from tests.support.router_harness import CHAT, Connection
from tests.support.wired import Wired, wired

SECRET = "a secret that is 96 bytes long, so that four tokens in a page and a budget of 32 drop most of it"
NUM_PROMPT = len(SECRET)
ROOT, CALLER = "chat fake", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

TREE = {
    "chat fake": ("packlight-router", "router-0"),
    "chat fake/prepare": ("packlight-router", "router-0"),
    "chat fake/route": ("packlight-router", "router-0"),
    "chat fake/attempt": ("packlight-router", "router-0"),
    "chat fake/attempt/generate": ("packlight-decode", "decode-0"),
    "chat fake/attempt/generate/admit": ("packlight-decode", "decode-0"),
    "chat fake/attempt/generate/prefill": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/prefill/queue": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/prefill/compute": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/prefill/select": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/prefill/pack": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/prefill/ship": ("packlight-prefill", "prefill-0"),
    "chat fake/attempt/generate/receive": ("packlight-decode", "decode-0"),
    "chat fake/attempt/generate/decode": ("packlight-decode", "decode-0"),
}


def body(max_tokens: int = 8, **fields) -> dict:
    packing = {"recipe": "snapkv", "budget": 32, "window": 8, "sinks": 2}
    messages = [{"role": "user", "content": SECRET}]
    fixed = {"model": "fake", "messages": messages, "ignore_eos": True, "kv": packing}
    return {**fixed, "max_tokens": max_tokens, **fields}


async def ask(server: Wired, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://router") as client:
        return await client.post(CHAT, json=body(**fields), headers=headers)


async def until_told(traces: Recorded, num_spans: int = len(TREE)) -> None:
    """A worker ends its spans when the pages are back, which may be after the answer."""
    await until(lambda: len(traces.spans) >= num_spans)


# ── an answer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def answered() -> tuple[Recorded, httpx.Response]:
    async def run() -> tuple[Recorded, httpx.Response]:
        traces = Recorded()
        async with wired(traces, prefill=PrefillConfig(chunk_tokens=32)) as server:
            response = await ask(server)
            await until_told(traces)
        return traces, response

    return asyncio.run(run())


def test_the_tree(answered):
    traces, response = answered
    assert response.status_code == 200, response.text
    assert sorted(traces.paths()) == sorted(TREE)
    assert {path: part_of(traces.one(path.rpartition("/")[2])) for path in TREE} == TREE
    assert len({span.context.trace_id for span in traces.spans}) == 1


def test_children_lie_within_their_parents(answered):
    traces, _ = answered
    by_id = {span.context.span_id: span for span in traces.spans}
    for span in traces.spans:
        assert span.end_time >= span.start_time
        if span.parent:
            parent = by_id[span.parent.span_id]
            # The two clocks are read one after the other, for each span that travels.
            assert parent.start_time - 1_000_000 <= span.start_time, (parent.name, span.name)
            assert span.end_time <= parent.end_time + 1_000_000 or span.name in ("generate", "prefill")
        assert all(span.start_time <= event.timestamp <= span.end_time for event in span.events), span.name


def test_kinds_show_where_a_wire_lies(answered):
    traces, _ = answered
    kinds = {span.name: span.kind for span in traces.spans}
    assert {name for name, kind in kinds.items() if kind is SpanKind.SERVER} == {ROOT, "generate", "prefill"}
    assert {name for name, kind in kinds.items() if kind is SpanKind.CLIENT} == {"attempt"}


def test_what_the_request_says_of_itself(answered):
    traces, response = answered
    usage, told = response.json()["usage"], traces.one(ROOT).attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "packlight"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "fake"
    assert told["gen_ai.request.max_tokens"] == told["gen_ai.usage.output_tokens"] == 8
    assert told["gen_ai.usage.input_tokens"] == NUM_PROMPT == usage["prompt_tokens"]
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["gen_ai.response.id"] == response.json()["id"]
    assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert told["packlight.request.id"] == response.headers["x-request-id"]
    assert told["packlight.kept_tokens"] == usage["kv"]["kept_tokens"] < NUM_PROMPT
    assert told["packlight.shipped_bytes"] == usage["kv"]["shipped_bytes"] > 0
    assert told["packlight.attention_mass"] == usage["kv"]["attention_mass_retained"]
    assert (told["http.response.status_code"], told["packlight.outcome"]) == (200, "completed")


def test_what_the_parts_say(answered):
    traces, _ = answered
    route, attempt = traces.one("route").attributes, traces.one("attempt").attributes
    assert (route["packlight.prefill.id"], route["packlight.decode.id"]) == ("prefill-0", "decode-0")
    assert (route["packlight.placement"], route["packlight.reason"]) == ("remote", "only_way")
    assert attempt["server.address"] == "127.0.0.1"
    assert attempt["packlight.recipe"] == "snapkv"
    assert attempt["packlight.attempt.id"] == f"{route['packlight.choice.id']}.0"
    assert traces.one("decode").attributes["packlight.decode.steps"] == 7
    assert [event.name for event in traces.one("decode").events] == ["first step"]
    prefill = traces.one("prefill").attributes
    assert prefill["packlight.transport"] == traces.one("ship").attributes["packlight.transport"]
    assert prefill["packlight.exact_bytes"] > prefill["packlight.shipped_bytes"]
    assert traces.one("receive").attributes["packlight.shipped_bytes"] == prefill["packlight.shipped_bytes"]


def test_chunks_and_layers_are_moments_not_spans(answered):
    traces, response = answered
    chunks = [event.attributes for event in traces.one("compute").events]
    assert sum(chunk["packlight.chunk.tokens"] for chunk in chunks) == NUM_PROMPT
    assert chunks[0]["packlight.chunk.start"] == 0
    assert len(chunks) >= 3
    layers = [event.attributes for event in traces.one("pack").events]
    assert [layer["packlight.layer"] for layer in layers] == list(range(fake_spec().num_layers))
    kept = [layer["packlight.kept_tokens"] for layer in layers]
    assert sum(kept) / len(kept) == pytest.approx(response.json()["usage"]["kv"]["kept_tokens"])
    for name, part in (("select", "packlight.select_s"), ("pack", "packlight.pack_s")):
        took_s = [layer[part] for layer in layers]
        assert traces.one(name).attributes["packlight.busy_s"] == pytest.approx(sum(took_s))
        assert min(took_s) > 0


def test_no_text_of_anybody(answered):
    traces, response = answered
    everything = "".join(span.to_json() for span in traces.spans)
    answer = response.json()["choices"][0]["message"]["content"]
    assert SECRET[:20] not in everything
    assert not answer or json.dumps(answer)[1:-1] not in everything


def test_every_attribute_is_in_the_documentation(answered):
    traces, _ = answered
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    names = {name for span in traces.spans for name in span.attributes}
    names |= {name for span in traces.spans for event in span.events for name in event.attributes}
    assert not [name for name in names if f"`{name}`" not in page]
    assert not [path for path in TREE if path.rpartition("/")[2].replace("fake", "MODEL") not in page]


# ── whose trace it is ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_callers_trace_goes_on():
    traces = Recorded(ratio=0.0)  # the caller has decided
    async with wired(traces) as server:
        await ask(server, {"traceparent": CALLER, "tracestate": "rojo=00f067aa0ba902b7"})
        await until_told(traces)
    assert {f"{span.context.trace_id:032x}" for span in traces.spans} == {CALLER[3:35]}
    assert f"{traces.one(ROOT).parent.span_id:016x}" == CALLER[36:52]
    assert {span.context.trace_state.to_header() for span in traces.spans} == {"rojo=00f067aa0ba902b7"}


NOBODY = f"00-{'0' * 32}-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "header", ["", "nonsense", CALLER.upper(), CALLER[:-3], f"ff{CALLER[2:]}", NOBODY, f"{CALLER}-x"]
)
async def test_a_malformed_traceparent_begins_a_trace(header):
    traces = Recorded()
    async with wired(traces) as server:
        assert (await ask(server, {"traceparent": header})).status_code == 200
        await until_told(traces)
    assert traces.one(ROOT).parent is None
    assert f"{traces.one(ROOT).context.trace_id:032x}" != CALLER[3:35]


async def test_two_traceparents_are_none():
    traces = Recorded()
    async with wired(traces) as server:
        await ask(server, [("traceparent", CALLER), ("traceparent", CALLER)])
        await until_told(traces)
    assert traces.one(ROOT).parent is None


@pytest.mark.parametrize(
    ("ratio", "header"), [(1.0, f"{CALLER[:-1]}0"), (0.0, None)], ids=["by the caller", "by chance"]
)
async def test_what_is_not_sampled_is_recorded_nowhere(ratio, header, caplog):
    caplog.set_level(logging.INFO)
    traces = Recorded(ratio)
    async with wired(traces) as server:
        await ask(server, {"traceparent": header} if header else None)
    assert traces.spans == []
    lines = [json.loads(JsonLine().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line["message"] == "chat"]
    assert len(line["trace_id"]) == 32
    assert header is None or line["trace_id"] == CALLER[3:35]


async def test_log_lines_name_the_trace(caplog):
    caplog.set_level(logging.INFO)
    traces = Recorded()
    async with wired(traces) as server:
        await ask(server)
        await until_told(traces)
    assert f"trace_id={traces.one(ROOT).context.trace_id:032x}" in caplog.text


# ── whatever becomes of it ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_request_is_a_trace_of_one_span():
    traces = Recorded()
    async with wired(traces) as server:
        response = await ask(server, max_tokens=10_000)
        assert response.status_code == 400
    span = traces.one(ROOT)
    assert len(traces.spans) == 1
    assert span.attributes["error.type"] == "ContextLengthExceeded"
    assert span.attributes["http.response.status_code"] == 400
    assert span.status.status_code is StatusCode.UNSET, "the client's fault"


async def test_a_failed_step_is_an_error_all_the_way_up():
    traces = Recorded()
    async with wired(traces) as server:
        server.pair.prefill_gate.error = InternalError("the sums went wrong")
        assert (await ask(server)).status_code == 500
        await until(lambda: traces.all("prefill") != [] and traces.all("generate") != [])
    for name in ("prefill", "generate", "attempt", ROOT):
        span = traces.one(name)
        assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "InternalError"), name
    assert traces.one("generate").status.description == "the sums went wrong"
    assert "sums" not in traces.one(ROOT).status.description, "what the client is told"
    assert traces.one("prefill").attributes["packlight.outcome"] == "failed"


async def test_a_client_that_leaves_while_decoding():
    traces = Recorded()
    async with wired(traces) as server:
        server.pair.decode_gate.is_open = False
        connection = Connection(server.app, CHAT, body(max_tokens=64, stream=True))
        await connection.until_received(2)
        connection.leave()
        await connection.task
        server.pair.decode_gate.let_all()
        await until(lambda: traces.all("generate") != [])
    assert traces.one(ROOT).attributes["packlight.outcome"] == "cancelled"
    assert traces.one("generate").attributes["packlight.outcome"] == "cancelled"
    assert all(span.status.status_code is StatusCode.UNSET for span in traces.spans)
    assert all(span.end_time for span in traces.spans)


async def test_a_client_that_leaves_while_its_prompt_waits():
    traces = Recorded()
    async with wired(traces) as server:
        server.pair.prefill_gate.is_open = False
        connection = Connection(server.app, CHAT, body())
        await until(lambda: server.pair.prefill.load().num_running == 1)
        connection.leave()
        await connection.task
        await until(lambda: traces.all("prefill") != [] and traces.all("generate") != [])
        server.pair.prefill_gate.let_all()
    assert traces.one("prefill").attributes["packlight.outcome"] == "cancelled"
    assert traces.all("ship") == traces.all("decode") == []


async def test_a_retry_is_a_second_attempt():
    traces = Recorded()
    async with fleet_of_fakes(num_prefill=1, traces=traces, router=RouterConfig(max_attempts=2), seed=3) as fleet:
        root = traces.tracer("router", "router").start("root")
        for name in ("decode-0", "decode-1"):  # whoever is first; the other has fewer to make
            fleet[name].link.num_tokens_until_cut = 5
        tokens, end = await events_of(fleet.pipeline.generate(make_request([3, 1, 4, 1, 5], 8, trace=root.context)))
        assert isinstance(end, Finished)
        await until(lambda: len(traces.all("generate")) == 2)
        root.end()
    assert len(tokens) == 8
    first, second = traces.all("attempt")
    assert [span.attributes["packlight.attempt.id"] for span in (first, second)] == ["r.0", "r.1"]
    assert (first.attributes["error.type"], first.status.status_code) == ("WorkerLost", StatusCode.ERROR)
    assert first.attributes["packlight.decode.id"] != second.attributes["packlight.decode.id"]
    assert "error.type" not in second.attributes
    by_attempt = {span.parent.span_id: span.attributes for span in traces.all("generate")}
    assert by_attempt[first.context.span_id]["packlight.outcome"] == "cancelled"
    assert by_attempt[second.context.span_id]["packlight.outcome"] == "completed"
    assert by_attempt[second.context.span_id]["packlight.resumed_tokens"] == 5
    assert len(traces.all("route")) == 2


async def test_a_prompt_prefilled_beside_the_answer_is_told_by_the_worker_that_did():
    traces = Recorded()
    async with fleet_of_fakes(num_prefill=0, num_decode=1, local_tokens=64, traces=traces) as fleet:
        await events_of(fleet.pipeline.generate(make_request([3, 1, 4, 1, 5], 3)))
        await until(lambda: traces.all("generate") != [])
    assert part_of(traces.one("prefill")) == ("packlight-prefill", "decode-0/prefill")
    assert traces.one("prefill").parent.span_id == traces.one("generate").context.span_id
    assert traces.one("route").attributes["packlight.placement"] == "local"


async def test_choices_have_attempts_of_their_own():
    traces = Recorded()
    async with wired(traces) as server:
        response = await ask(server, n=2, stream=True)
        assert response.status_code == 200
        await until(lambda: len(traces.all("generate")) == 2)
    told = traces.one(ROOT).attributes
    assert (told["gen_ai.request.choice.count"], told["gen_ai.request.stream"]) == (2, True)
    assert told["gen_ai.response.finish_reasons"] == ("length", "length")
    assert told["gen_ai.usage.output_tokens"] == 16
    assert {span.parent.span_id for span in traces.all("attempt")} == {traces.one(ROOT).context.span_id}
    assert len({span.attributes["packlight.choice.id"] for span in traces.all("route")}) == 2


async def test_a_worker_without_traces_passes_them_on():
    """So that a fleet can be switched over part by part."""
    traces, trace = Recorded(), TraceContext(CALLER)
    async with fleet_of_fakes(num_prefill=1, num_decode=1) as fleet:
        events = [event async for event in fleet.pipeline.generate(make_request([3, 1, 4], 3, trace=trace))]
        assert not isinstance(events[-1], Failed | Progress)
        assert fleet["prefill-0"].link.seen[0].trace == trace
    assert traces.spans == []
