"""What operators rely on: metrics that add up, logs without content, an event loop that is never blocked."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from packlight.core.errors import WorkerLost
from packlight.router import disconnect
from tests.support.router_harness import CHAT, Connection, Harness, chat_body
from tests.support.scripted_backend import NUM_CACHED, End, Fail, Say, one_by_one
from tests.support.tiny_tokenizer import tiny_tokenizer


async def test_metrics_of_an_answer() -> None:
    harness = Harness([Say([80]), Say([81, 82]), End()])
    await harness.chat(n=2)
    num_prompt = harness.backend.requests[0].num_prompt_tokens
    assert harness.outcomes() == {"completed": 1.0}
    assert harness.metric("request_seconds_count", endpoint="chat") == 1
    assert harness.metric("prompt_tokens_total") == num_prompt
    assert harness.metric("cached_prompt_tokens_total") == NUM_CACHED
    assert harness.metric("generated_tokens_total") == 6
    assert harness.metric("time_to_first_token_seconds_count") == 2
    assert harness.metric("time_per_output_token_seconds_count") == 2
    assert harness.metric("time_to_first_token_part_seconds_count", part="prepare") == 1
    assert harness.metric("time_to_first_token_part_seconds_sum", part="prefill") == pytest.approx(0.06)
    assert harness.metric("shipped_bytes_total", recipe="snapkv") == 2000
    assert harness.metric("compression_ratio_sum", recipe="snapkv") == pytest.approx(16)
    assert harness.metric("attention_mass_retained_sum", recipe="snapkv") == pytest.approx(1.94)


async def test_tokens_of_a_failed_answer_are_counted() -> None:
    harness = Harness([Say([80, 81, 82]), Fail(WorkerLost("gone"))])
    await harness.chat(stream=True)
    assert harness.metric("generated_tokens_total") == 3
    assert harness.metric("errors_total", type="WorkerLost") == 1
    assert harness.metric("cached_prompt_tokens_total") == NUM_CACHED


async def test_logs_name_requests_and_hold_no_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answer = tiny_tokenizer().encode("secret answer")
    harness = Harness(one_by_one(answer))
    headers = {"x-request-id": "abc", "x-stainless-retry-count": "2"}
    response = await harness.post(CHAT, chat_body("secret prompt"), headers)
    assert response.json()["choices"][0]["message"]["content"] == "secret answer"
    await harness.post(CHAT, chat_body("secret prompt", n=0), headers | {"x-stainless-retry-count": "evil\tvalue"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("packlight")]
    assert len(lines) == 2
    assert f"request=abc answer={response.json()['id']} retry=2 outcome=completed status=200 error=-" in lines[0]
    assert f"generated={len(answer)}" in lines[0]
    assert "retry=? outcome=invalid status=400 error=InvalidRequest" in lines[1]
    assert "secret" not in caplog.text


async def test_tokenising_does_not_block_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(one_by_one([80]))
    started, go = threading.Event(), threading.Event()
    encode = type(harness.model.tokenizer).encode

    def slow(self: Any, text: str, **kwargs: Any) -> list[int]:
        started.set()
        assert go.wait(5)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(type(harness.model.tokenizer), "encode", slow)
    connection = Connection(harness.app, CHAT, chat_body())
    await asyncio.to_thread(started.wait, 5)
    async with harness.client() as client:
        assert (await client.get("/health")).json()["inflight_requests"] == 1
    go.set()
    await connection.task
    assert connection.sent[0]["status"] == 200


async def test_leaving_while_tokenising_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(one_by_one([80]))
    started, go = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> list[int]:
        started.set()
        assert go.wait(5)
        return [5]

    monkeypatch.setattr(type(harness.model.tokenizer), "encode", slow)
    connection = Connection(harness.app, CHAT, chat_body())
    await asyncio.to_thread(started.wait, 5)
    connection.leave()
    await asyncio.wait_for(connection.task, 60)
    go.set()
    assert harness.backend.requests == []
    assert harness.outcomes() == {"cancelled": 1.0}


async def test_a_body_that_never_arrives_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "_BODY_TIMEOUT_S", 0.02)
    harness = Harness()
    connection = Connection(harness.app, CHAT, b'{"model":', more_body=True)
    await asyncio.wait_for(connection.task, 60)
    assert connection.sent[0]["status"] == 408
    assert harness.gate.num_inside == 0
    assert harness.outcomes() == {"invalid": 1.0}
