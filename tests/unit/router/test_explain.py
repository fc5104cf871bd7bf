"""`kv.explain`: which parts of a client's own prompt were kept, told to that client only when it asks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.compress.policy import Plan
from packlight.core.config_tree import build_config
from packlight.core.kept_map import KeptMap
from packlight.core.types import Finished, GenerateEvent, GenerateRequest, Progress
from packlight.models.fake_spec import FakeTokenizer, fake_spec
from packlight.router.app import build_app
from packlight.router.explain import texts
from packlight.router.service import ServedModel
from packlight.telemetry.metrics import RouterMetrics
from tests.support.fleet_of_fakes import fleet_of_fakes
from tests.support.router_harness import CHAT, COMPLETIONS, MODEL, Harness, events_of
from tests.support.scripted_backend import ScriptedBackend, one_by_one
from tests.support.tiny_tokenizer import tiny_model

PROMPT = "The first words, then a long middle that nobody asks about, and the very last words?"
STREAMING = {"recipe": "streaming_llm", "budget": 20, "window": 8, "sinks": 6}


@asynccontextmanager
async def app_of_real_workers() -> AsyncIterator[FastAPI]:
    """A byte is a token; workers, selection and pipeline are the real ones."""
    async with fleet_of_fakes() as fleet:
        model = ServedModel(fake_spec(), FakeTokenizer())
        yield build_app(build_config({}), model, fleet.pipeline, RouterMetrics(CollectorRegistry()))


async def ask(app: FastAPI, path: str = CHAT, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
        body = {"model": "fake", "max_tokens": 4, **fields}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": PROMPT}]
        return await client.post(path, json=body)


async def test_the_map_of_a_packed_prompt() -> None:
    async with app_of_real_workers() as app:
        response = await ask(app, kv={**STREAMING, "explain": True})
    kv = response.json()["usage"]["kv"]
    explain = kv["explain"]
    assert explain["bin_tokens"] == 1
    assert explain["texts"] == list(PROMPT)
    (group,) = explain["groups"]
    assert (group["first_layer"], group["last_layer"]) == (0, 0)
    assert group["kept_tokens"] == kv["kept_tokens"] == 20
    assert group["shares"] == [1] * 6 + [0] * (len(PROMPT) - 20) + [1] * 14


async def test_a_stream_says_it_in_its_last_chunk() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with app_of_real_workers() as app:
        events = events_of(await ask(app, kv={**STREAMING, "explain": True}, **options))
    assert "".join(events[-2]["usage"]["kv"]["explain"]["texts"]) == PROMPT
    assert not any(event["usage"] for event in events[:-2])


async def test_nothing_is_dropped_by_recipe_none() -> None:
    async with app_of_real_workers() as app:
        response = await ask(app, COMPLETIONS, prompt=PROMPT, kv={"recipe": "none", "explain": True}, n=2)
    (group,) = response.json()["usage"]["kv"]["explain"]["groups"]
    assert group["shares"] == [1] * len(PROMPT)


@pytest.mark.parametrize("kv", [{}, {"explain": False}, STREAMING])
async def test_it_is_told_to_nobody_else(kv: dict[str, Any]) -> None:
    async with app_of_real_workers() as app:
        response = await ask(app, kv=kv)
    assert response.status_code == 200
    assert "explain" not in response.json()["usage"]["kv"]


class MappingBackend(ScriptedBackend):
    """Reports `kept_map`, asked or not."""

    def __init__(self, kept_map: KeptMap | None) -> None:
        super().__init__(one_by_one([80]))
        self.kept_map = kept_map

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[GenerateEvent, None]:
        async for event in super().generate(request, plan):
            if isinstance(event, Progress | Finished):
                kv = replace(event.usage.kv, kept_map=self.kept_map)
                event = replace(event, usage=replace(event.usage, kv=kv))
            yield event


@pytest.mark.parametrize("kept_map", [None, KeptMap(3, 1, 1, (1.0,), b"\x00\x00\xff")])
async def test_workers_that_do_not_say_or_say_it_of_another_prompt(kept_map: KeptMap | None) -> None:
    harness = Harness()
    harness.use_backend(MappingBackend(kept_map))
    response = await harness.chat("Some words", kv={"explain": True})
    assert response.json()["usage"]["kv"]["explain"] is None
    response = await harness.chat("Some words")
    assert "explain" not in response.json()["usage"]["kv"]


async def test_only_the_first_sample_is_asked_for_it() -> None:
    harness = Harness(one_by_one([80]))
    await harness.chat("Hello", kv={"explain": True}, n=3)
    by_id = {request.request_id.rpartition("-")[2]: request.explain for request in harness.backend.requests}
    assert by_id == {"0": True, "1": False, "2": False}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "Hello", "kv": {"explain": "yes"}}, "Expected a boolean"),
        ({"prompt": "Hello", "kv": {"explain": 1}}, "Expected a boolean"),
        ({"prompt": ["Hello", "again"], "kv": {"explain": True}}, "only one can be explained"),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], says: str) -> None:
    response = await Harness().post(COMPLETIONS, {"model": MODEL, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "kv.explain")
    assert says in error["message"]


@pytest.mark.parametrize("bin_tokens", [1, 2, 3, 7, 1000])
def test_characters_that_span_bins_are_whole(bin_tokens: int) -> None:
    tokenizer = tiny_model(256).tokenizer
    text = "naïve café — 你好, мир 🙂 end"
    token_ids = tokenizer.encode(text)
    parts = list(texts(token_ids, bin_tokens, tokenizer))
    assert "".join(parts) == text
    assert len(parts) == -(-len(token_ids) // bin_tokens)
