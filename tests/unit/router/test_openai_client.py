"""The real OpenAI client against the real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from packlight.core.errors import QueueFull, WorkerLost
from packlight.core.types import FinishReason
from tests.support.router_harness import MODEL, Harness, serving
from tests.support.scripted_backend import NUM_CACHED, Fail, Say, Script, Step, Throw, one_by_one
from tests.support.tiny_tokenizer import EOS_ID, tiny_tokenizer

ENCODE = tiny_tokenizer().encode
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]


@asynccontextmanager
async def talking(script: Script | Sequence[Step], **config: Any) -> AsyncIterator[tuple[AsyncOpenAI, Harness]]:
    harness = Harness(script, **config)
    async with (
        serving(harness.app) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, harness


async def test_a_whole_answer() -> None:
    async with talking(one_by_one([*ENCODE("Hello wörld 🎉"), EOS_ID])) as (client, harness):
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, seed=1)
    assert answer.choices[0].message.content == "Hello wörld 🎉"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == harness.backend.requests[0].num_prompt_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == NUM_CACHED
    assert answer.usage.kv["recipe"] == "snapkv"  # type: ignore[attr-defined]
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


async def test_a_stream_with_usage() -> None:
    async with talking(one_by_one(ENCODE("Hello wörld 🎉"), FinishReason.LENGTH)) as (client, _):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wörld 🎉"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ENCODE("Hello wörld 🎉"))


async def test_the_clients_own_accumulation_of_a_stream() -> None:
    async with (
        talking(lambda request: one_by_one(ENCODE(f"answer {request.request_id[-1]}"))) as (client, _),
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, n=3, logprobs=True) as stream,
    ):
        answer = await stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == ["answer 0", "answer 1", "answer 2"]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert (
            b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode() == choice.message.content
        )


async def test_n_logprobs_and_stop() -> None:
    async with talking(one_by_one(ENCODE("one, two, three"))) as (client, _):
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, stop=[", th"], logprobs=True, top_logprobs=3
        )
    assert [choice.message.content for choice in answer.choices] == ["one, two"] * 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "one, two"
    assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)


async def test_extensions_travel_in_the_extra_body() -> None:
    async with talking(one_by_one([80])) as (client, harness):
        await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            extra_body={"top_k": 5, "kv": {"recipe": "snapkv", "ratio": 0.5}, "ignore_eos": True},
        )
    (request,) = harness.backend.requests
    assert (request.sampling.top_k, request.pack.recipe, request.pack.ratio) == (5, "snapkv", 0.5)
    assert request.stop.ignore_eos


async def test_completions() -> None:
    async with talking(one_by_one(ENCODE("two"))) as (client, _):
        whole = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1)
        stream = await client.completions.create(model=MODEL, prompt=[5, 6], stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert [choice.text for choice in whole.choices] == ["two", "two"]
    assert text == "two"


async def test_models() -> None:
    async with talking([]) as (client, _):
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another")


async def test_a_bad_request_is_a_typed_exception() -> None:
    async with talking([]) as (client, _):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
        assert (caught.value.param, caught.value.code) == ("temperature", "decimal_above_max_value")
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id is not None
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-7", messages=MESSAGES)
        assert missing.value.code == "model_not_found"


async def test_an_error_in_mid_stream_is_an_exception() -> None:
    async with talking([Say([80]), Fail(WorkerLost("gone"))]) as (client, _):
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for _chunk in stream:
                pass
    assert caught.value.code == "worker_lost"


async def test_the_client_retries_when_it_is_told_to() -> None:
    scripts = iter([[Throw(QueueFull("full", retry_after_s=0.01))], one_by_one(ENCODE("there you are"))])
    async with talking(lambda _: next(scripts)) as (client, harness):
        patient = client.with_options(max_retries=1)
        answer = await patient.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == "there you are"
    assert harness.outcomes() == {"refused": 1.0, "completed": 1.0}


async def test_the_client_does_not_repeat_what_cannot_help() -> None:
    async with talking([Throw(ZeroDivisionError())]) as (client, harness):
        with pytest.raises(openai.InternalServerError):
            await client.with_options(max_retries=3).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert harness.outcomes() == {"failed": 1.0}


async def test_closing_a_stream_closes_the_backend() -> None:
    async with talking([Say([80])] * 1000) as (client, harness):
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await harness.backend.until(lambda: harness.backend.num_open == 0)
    assert len(harness.backend.requests) == 1
