"""One request: what is sent, when things came, and what counts as no answer. Time is virtual, so times are exact."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.client import Client, find_model, make_http
from packlight.bench.serve.prompts import Prompts, Question
from packlight.bench.serve.stream import Piece, read_stream
from packlight.bench.serve.targets import Target, parse_targets
from packlight.core.errors import ConfigError
from packlight.models.fake_spec import FakeTokenizer
from tests.support.scripted_openai import Script, ScriptedServer, run_in_virtual_time, virtual_clock

QUESTION = Question("What is it?", " It is", ("word",))


def ask(server: httpx.AsyncBaseTransport, *, api: str = "completions", body: dict | None = None, **fields) -> Answer:
    async def main() -> Answer:
        target = Target("a", "http://server", body=body or {})
        async with httpx.AsyncClient(transport=server) as http:
            client = Client(target, "scripted", http, Prompts(FakeTokenizer(), api), virtual_clock, 5)
            return await client.ask("tag", QUESTION, **fields)

    return run_in_virtual_time(main())


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_times_are_the_servers(api: str) -> None:
    answer = ask(ScriptedServer(Script(first_s=0.5, gap_s=0.1, kv={"recipe": "none"})), api=api)
    assert answer == Answer(
        due_s=0.0,
        sent_s=0.0,
        event_s=(0.5, 0.6, 0.7, 0.8, 0.9),
        end_s=0.9,
        num_prompt_tokens=11,
        num_output_tokens=5,
        found=True,
        text="word " * 5,
        kv={"recipe": "none"},
    )
    assert (answer.ttft_s, answer.tpot_s, answer.e2e_s) == pytest.approx((0.5, 0.1, 0.9))


def test_tokens_are_counted_by_usage_and_not_by_events() -> None:
    answer = ask(ScriptedServer(Script(tokens_per_event=2, num_silent=1, end_s=0.3)))
    assert (answer.event_s, answer.end_s) == ((0.5, 0.6), 0.9)
    assert answer.tpot_s == pytest.approx(0.4 / 4)


def test_without_usage_the_text_is_tokenised() -> None:
    answer = ask(ScriptedServer(Script(has_usage=False)))
    assert (answer.counted_by, answer.num_output_tokens) == ("tokenizer", len("word ") * 5)


def test_what_is_sent() -> None:
    server = ScriptedServer(Script())
    ask(server, body={"kv": {"recipe": "h2o"}, "ignore_eos": None, "top_k": 1})
    assert server.paths == ["/v1/completions"]
    assert server.bodies == [
        {
            "model": "scripted",
            "prompt": "tag\nWhat is it? It is",
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "kv": {"recipe": "h2o"},
            "top_k": 1,
        }
    ]


def test_an_answer_that_was_due_earlier_waited_since_then() -> None:
    answer = ask(ScriptedServer(Script()), due_s=-2.0 + 2.0, is_follow_up=True)
    assert (answer.due_s, answer.is_follow_up) == (0.0, True)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(status=429), "HTTP 429: no room"),
        (Script(error_after=2), "worker lost"),
        (Script(cut_after=2), "ended without a finish reason"),
        (Script(word=""), "no text"),
    ],
)
def test_what_is_no_answer(script: Script, words: str) -> None:
    answer = ask(ScriptedServer(script))
    assert words in answer.error
    assert (answer.ttft_s, answer.found) == (None, None)


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.ReadError("reset")])
def test_a_broken_connection_is_no_answer(error: httpx.HTTPError) -> None:
    def raise_it(body: dict) -> None:
        raise error

    assert ask(ScriptedServer(Script(before=raise_it))).error == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"<h1>Bad gateway</h1>", "Bad gateway"), (b'{"detail": "no field x"}', "no field x"), (b"[1]", "[1]")],
)
def test_refusals_in_other_words(body: bytes, words: str) -> None:
    answer = ask(httpx.MockTransport(lambda request: httpx.Response(502, content=body)))
    assert answer.error.startswith("HTTP 502: ")
    assert words in answer.error


# ── the stream ───────────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS = [
    {"choices": [{"text": "schön "}]},
    {"choices": [{"text": ""}]},
    {"choices": [{"delta": {"content": "ist"}}]},
    {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 4}},
]
LINES = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode() for event in EVENTS]
STREAM = b": hello\n\n" + b"".join(LINES) + b"data: [DONE]\n\n"


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_a_stream_reads_the_same_wherever_it_is_cut(borders: set[int]) -> None:
    edges = [0, *sorted(borders), len(STREAM)]
    pieces = [Piece(float(end), STREAM[start:end]) for start, end in pairwise(edges)]
    reading = read_stream(pieces)
    assert (reading.text, reading.usage, reading.error) == ("schön ist", {"completion_tokens": 4}, None)
    # An event is there when the piece that ends its line is.
    ends = [STREAM.index(line) + line.index(b"\n") + 1 for line in (LINES[0], LINES[2], LINES[3])]
    came = [next(edge for edge in edges if edge >= end) for end in ends]
    assert ([*reading.event_s, reading.end_s]) == came


@pytest.mark.parametrize("data", [b"data: {nonsense\n", b"data: [1]\n", b'data: {"choices": [7]}\n', b"data: 3\n"])
def test_events_that_are_none_of_the_apis(data: bytes) -> None:
    assert "none of the API's" in read_stream([Piece(0.0, data)]).error


@pytest.mark.parametrize("error", [{"message": "gone"}, "gone"])
def test_error_events(error: object) -> None:
    pieces = [Piece(0.0, LINES[0]), Piece(1.0, f"data: {json.dumps({'error': error})}\n".encode())]
    assert read_stream(pieces).error == "gone"


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def found_model(transport: httpx.AsyncBaseTransport, model: str | None = None) -> str:
    async def main() -> str:
        async with httpx.AsyncClient(transport=transport) as http:
            return await find_model(Target("a", "http://server", model=model), http)

    return run_in_virtual_time(main())


def test_the_model_is_the_first_that_the_server_lists_unless_it_is_given() -> None:
    server = ScriptedServer(Script())
    assert found_model(server) == "scripted"
    assert found_model(server, "mine") == "mine"
    assert server.paths == ["/v1/models"]


@pytest.mark.parametrize("reply", [httpx.Response(500), httpx.Response(200, text="hm"), httpx.Response(200, json={})])
def test_a_server_that_names_no_model(reply: httpx.Response) -> None:
    with pytest.raises(ConfigError, match=r"--server a=http://server: .* --model a=MODEL"):
        found_model(httpx.MockTransport(lambda request: reply))


async def test_connections_are_not_reused_and_a_key_is_sent() -> None:
    async with make_http(1.0, "secret") as http:
        assert http.headers["authorization"] == "Bearer secret"
        assert http._transport._pool._max_keepalive_connections == 0


def test_flags_make_targets() -> None:
    one, two = parse_targets(
        ["one=http://h:1/v1/", "two=https://h:2"],
        models=["one=org/model:tag"],
        kvs=['two:{"recipe": "snapkv"}'],
        bodies=['two:{"top_k": 1}'],
        metrics=["one=http://h:1/metrics"],
        pids=["two=42"],
    )
    assert one == Target("one", "http://h:1", "org/model:tag", metrics_url="http://h:1/metrics")
    assert two == Target("two", "https://h:2", body={"top_k": 1, "kv": {"recipe": "snapkv"}}, pid=42)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"servers": []}, ["--server is missing"]),
        ({"servers": ["http://h:1"]}, ["NAME=VALUE"]),
        ({"servers": ["a=h:1"]}, ["--server a=h:1", "http://127.0.0.1:8000"]),
        ({"servers": ["a=http://h", "a=http://i"]}, ["--server a", "twice"]),
        ({"kvs": ["b:{}"]}, ["--kv b", "there are a"]),
        ({"kvs": ["a:{"]}, ["--kv a", "not valid JSON"]),
        ({"bodies": ["a:[1]"]}, ["--body a", "object"]),
        ({"pids": ["a=x"]}, ["--pid a=x", "number"]),
        ({"models": ["a="]}, ["--model a=", "NAME=VALUE"]),
    ],
)
def test_wrong_flags_are_named(flags: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_targets(**({"servers": ["a=http://h"]} | flags))
    assert all(word in refused.value.message for word in words), refused.value.message
