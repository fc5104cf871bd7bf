"""Merging choices, and closing what is behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from packlight.compress.policy import Plan
from packlight.core.errors import InternalError, WorkerLost
from packlight.core.types import GenerateEvent, GenerateRequest, SamplingParams, StopRules
from packlight.router.choice import Choice
from packlight.router.generation import Generation
from tests.support.scripted_backend import End, Fail, Say, ScriptedBackend, Step, Throw, Wait, one_by_one
from tests.support.tiny_tokenizer import tiny_tokenizer


def choices(num: int, stops: Sequence[str] = ()) -> list[Choice]:
    requests = [GenerateRequest(f"r-{i}", (5, 6), 2, SamplingParams(), StopRules(100)) for i in range(num)]
    return [Choice(i, request, tiny_tokenizer(), stops) for i, request in enumerate(requests)]


def generation(backend: ScriptedBackend, num: int = 1, stops: Sequence[str] = ()) -> Generation:
    return Generation(backend, choices(num, stops), clock=lambda: 0.0)


async def texts(under_way: Generation) -> dict[int, str]:
    found: dict[int, str] = {}
    async with under_way:
        async for delta in under_way.deltas():
            found[delta.index] = found.get(delta.index, "") + delta.text
    return found


async def test_choices_are_merged() -> None:
    words = ["zero", "one"]
    backend = ScriptedBackend(lambda r: one_by_one(tiny_tokenizer().encode(words[int(r.request_id[-1])])))
    assert await texts(generation(backend, 2)) == {0: "zero", 1: "one"}
    assert backend.num_open == 0


async def test_a_slow_choice_does_not_hold_up_the_others() -> None:
    go = Wait()
    backend = ScriptedBackend(lambda r: [*([go] if r.request_id == "r-0" else []), Say([80]), End()])
    order = []
    async with generation(backend, 2) as under_way:
        async for delta in under_way.deltas():
            order.append(delta.index)
            if delta.index == 1 and delta.finish_reason:
                go.event.set()
    assert order == [1, 1, 0, 0]


async def test_what_was_said_before_an_error_is_delivered_before_it() -> None:
    backend = ScriptedBackend([Say([80]), Say([81]), Fail(WorkerLost("gone"))])
    async with generation(backend) as under_way:
        deltas = under_way.deltas()
        assert [bool((await anext(deltas)).text) for _ in range(2)] == [True, True]
        with pytest.raises(WorkerLost):
            await anext(deltas)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("script", [[], [Say([80])]])
async def test_an_answer_must_have_an_end(script: list[Step], num: int) -> None:
    with pytest.raises(InternalError):
        await texts(generation(ScriptedBackend(script), num))


async def test_events_after_the_end_are_not_asked_for() -> None:
    backend = ScriptedBackend([Say([80]), End(), Throw(ZeroDivisionError())])
    assert await texts(generation(backend)) == {0: tiny_tokenizer().text([80])}
    assert backend.num_steps == {"r-0": 2}


async def test_leaving_early_closes_every_choice() -> None:
    backend = ScriptedBackend([Say([80]), Wait()])
    async with generation(backend, 3) as under_way:
        await anext(aiter(under_way.deltas()))
    assert backend.ended == {f"r-{i}": "closed" for i in range(3)}


async def test_a_reader_that_stops_stops_the_backend() -> None:
    backend = ScriptedBackend([*([Say([80])] * 500), End()])
    async with generation(backend) as under_way:
        await anext(aiter(under_way.deltas()))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert backend.num_steps["r-0"] < 30


async def test_leaving_is_not_held_up_by_a_backend_that_fails_to_close_with_a_full_queue() -> None:
    class Stubborn(ScriptedBackend):
        async def generate(
            self, request: GenerateRequest, plan: Plan | None = None
        ) -> AsyncGenerator[GenerateEvent, None]:
            try:
                async for event in super().generate(request):
                    yield event
            finally:
                raise WorkerLost("could not say goodbye")

    backend = Stubborn([*([Say([80])] * 500), End()])
    async with asyncio.timeout(60):
        async with generation(backend) as under_way:
            await anext(aiter(under_way.deltas()))
            for _ in range(100):
                await asyncio.sleep(0)
