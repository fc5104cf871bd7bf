"""Server-sent events: order, shape, errors, keep-alives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from packlight.core.errors import QueueFull, WorkerLost
from packlight.core.types import FinishReason
from tests.support.router_harness import (
    CHAT,
    COMPLETIONS,
    MODEL,
    Connection,
    Harness,
    chat_body,
    events_of,
    streamed_text,
)
from tests.support.scripted_backend import End, Fail, Say, Throw, Wait, one_by_one
from tests.support.tiny_tokenizer import EOS_ID, tiny_tokenizer

ENCODE = tiny_tokenizer().encode


async def test_the_order_of_a_stream() -> None:
    ids = ENCODE("Hello world!")
    harness = Harness(one_by_one([*ids, EOS_ID]))
    response = await harness.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"].startswith("req_")
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    assert response.text.endswith("data: [DONE]\n\n")
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk.keys() == {
            "id",
            "object",
            "created",
            "model",
            "choices",
            "service_tier",
            "system_fingerprint",
        }
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert [choice["delta"] for choice in choices[1:-1]] == [{"content": tiny_tokenizer().text([i])} for i in ids]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


async def test_usage_comes_last_when_it_is_asked_for() -> None:
    ids = ENCODE("Hello world!")
    whole = (await Harness(one_by_one(ids)).chat()).json()
    response = await Harness(one_by_one(ids)).chat(stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events_of(response)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    for usage in (last["usage"], whole["usage"]):
        usage["kv"]["timings_ms"].pop("prepare")
    assert last["usage"] == whole["usage"]


async def test_running_usage_counts_up() -> None:
    ids = ENCODE("Hello world!")
    response = await Harness(one_by_one(ids)).chat(stream=True, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in events_of(response)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids)


async def test_a_stream_says_what_a_whole_answer_says() -> None:
    ids = ENCODE("žluťoučký kůň 🎉 and: STO, not more")
    for script in (one_by_one(ids), [Say(ids), End()], [Say(ids[:5]), Say(ids[5:]), End()]):
        for stop in (None, "STOP", "ň", [",", " 🎉"]):
            whole = (await Harness(script).chat(stop=stop)).json()["choices"][0]
            events = events_of(await Harness(script).chat(stop=stop, stream=True))
            assert streamed_text(events) == whole["message"]["content"]
            assert events[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]


async def test_logprobs_of_a_stream_are_those_of_the_whole_answer() -> None:
    ids = ENCODE("two 🎉 words")
    wanted = {"logprobs": True, "top_logprobs": 1, "stop": "ds"}
    whole = (await Harness(one_by_one(ids)).chat(**wanted)).json()["choices"][0]["logprobs"]["content"]
    choices = [
        event["choices"][0] for event in events_of(await Harness(one_by_one(ids)).chat(stream=True, **wanted))[:-1]
    ]
    parts = [choice["logprobs"] for choice in choices if choice["delta"].get("content")]
    assert [entry for part in parts for entry in part["content"]] == whole
    assert all(part["refusal"] is None for part in parts)


async def test_choices_of_a_stream_keep_their_index() -> None:
    words = ["zero", "one", "two"]
    harness = Harness(lambda request: one_by_one(ENCODE(words[int(request.request_id[-1])])))
    events = events_of(await harness.chat(stream=True, n=3))
    assert [streamed_text(events, index) for index in range(3)] == words
    for index in range(3):
        mine = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
        assert "role" in mine[0]["delta"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


async def test_completions_stream_too() -> None:
    harness = Harness(one_by_one(ENCODE("one two"), FinishReason.LENGTH))
    response = await harness.post(COMPLETIONS, {"model": MODEL, "prompt": ["a", "b"], "stream": True})
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": []}, strict=True)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "one two"
        assert mine[-1] == {"text": "", "index": index, "logprobs": None, "finish_reason": "length"}


async def test_nothing_is_sent_before_the_first_event() -> None:
    go = Wait()
    harness = Harness([go, *one_by_one([80])], keepalive_s=0.01)
    connection = Connection(harness.app, CHAT, chat_body(stream=True))
    await harness.backend.until(lambda: harness.backend.num_open == 1)
    await asyncio.sleep(0.05)
    assert connection.sent == []
    go.event.set()
    await connection.task
    assert connection.sent[0]["status"] == 200


async def test_an_idle_stream_is_kept_alive() -> None:
    go = Wait()
    harness = Harness([Say([80]), go, Say([81]), End()], keepalive_s=0.02)
    connection = Connection(harness.app, CHAT, chat_body(stream=True))
    await connection.until_received(4)
    assert [message["body"] for message in connection.sent[2:4]] == [b": keep-alive\n\n"] * 2
    go.event.set()
    await connection.task
    assert connection.sent[-1]["body"] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("breaks", [Fail(WorkerLost("10.0.0.7 died")), Throw(WorkerLost("10.0.0.7 died"))])
async def test_an_error_in_mid_stream_is_an_event_and_no_done(breaks: Any) -> None:
    harness = Harness([Say([80]), breaks])
    response = await harness.chat(stream=True)
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert streamed_text(chunks) == tiny_tokenizer().text([80])
    assert last == {
        "error": {
            "message": "A worker failed while it served this request. Please try again.",
            "type": "server_error",
            "param": None,
            "code": "worker_lost",
        }
    }
    assert "[DONE]" not in response.text
    assert "10.0.0.7" not in response.text
    assert harness.outcomes() == {"failed": 1.0}
    assert harness.backend.num_open == 0


async def test_a_bug_in_mid_stream_is_an_event_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    response = await Harness([Say([80]), Throw(ZeroDivisionError("secret"))]).chat(stream=True)
    assert events_of(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_second_choice_that_cannot_start_breaks_the_stream() -> None:
    def script(request: Any) -> Any:
        return [Say([80]), Wait()] if request.request_id.endswith("-0") else [Throw(QueueFull("full"))]

    harness = Harness(script)
    response = await harness.chat(stream=True, n=2)
    assert events_of(response)[-1]["error"]["code"] == "rate_limit_exceeded"
    assert set(harness.backend.ended.values()) == {"closed", "raised"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_a_504(stream: bool) -> None:
    harness = Harness([Wait()], request_timeout_s=0.05)
    response = await harness.chat(stream=stream)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"
    assert set(harness.backend.ended.values()) == {"closed"}
    assert harness.outcomes() == {"timeout": 1.0}


async def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    harness = Harness([Say([80]), Wait()], request_timeout_s=0.5)
    response = await harness.chat(stream=True)
    assert events_of(response)[-1]["error"]["code"] == "timeout"
    assert set(harness.backend.ended.values()) == {"closed"}


async def test_a_reader_that_is_stuck_stops_the_backend_and_is_cut() -> None:
    harness = Harness([*(Say([80]) for _ in range(1000)), End()], request_timeout_s=0.2)
    connection = Connection(harness.app, CHAT, chat_body(stream=True), max_parts=2)
    await asyncio.wait_for(connection.task, 60)
    (num_steps,) = harness.backend.num_steps.values()
    assert num_steps < 50
    assert harness.backend.num_open == 0
    assert harness.outcomes() == {"timeout": 1.0}
    assert harness.gate.num_inside == 0
