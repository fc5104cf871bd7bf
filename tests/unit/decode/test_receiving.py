"""A decode worker on a device whose copies are done when the test says so: steps go on, and nobody reads too early."""

import asyncio
import contextlib
from functools import partial

import pytest

from packlight.core.errors import InternalError
from packlight.core.types import Failed, PackSpec, Tokens
from packlight.decode.task import Stage
from packlight.decode.uploads import Uploads
from tests.support.deferred_side import DeferredSide
from tests.support.fake_pair import answer, collect
from tests.support.fake_pair import until as until_soon
from tests.support.real_pair import greedy, real_pair
from tests.support.tiny_models import sharp_llama

LIMIT_BYTES = 1 << 20
until = partial(until_soon, timeout_s=60)
PROMPTS = [tuple(5 + (7 + 2 * n) * i % 240 for i in range(60 + 30 * n)) for n in range(3)]
PACKS = {
    "none": PackSpec(),
    "quest": PackSpec("quest", budget_tokens=48, params=(("dense_layers", 1.0),)),
    "int8": PackSpec("snapkv", budget_tokens=40, window=8, codec="int8"),
    "h2o": PackSpec("h2o", budget_tokens=48, window=8, params=(("evict", 1.0),)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sharp_llama(tmp_path_factory.mktemp("llama"), 2)


@contextlib.asynccontextmanager
async def deferred_pair(model, *, limit_bytes=LIMIT_BYTES, **how):
    """(pair, side): the decode worker's pages are written when `side` says so, and hold large numbers before."""
    async with real_pair(model, num_tokens=how.pop("num_tokens", 2048), **how) as pair:
        side, worker = DeferredSide(), pair.decode
        worker._memory.uploads = Uploads(side, limit_bytes=limit_bytes)
        if "kv_codec" not in how:
            for memory in (worker._memory.pool.k, worker._memory.pool.v):
                memory.fill_(1e4)
        decode = worker._runner.decode
        worker._runner.decode = lambda *args, **kwargs: (side.compute(), decode(*args, **kwargs))[1]
        try:
            yield pair, side
        finally:
            side.finish()


@contextlib.asynccontextmanager
async def ending(side):
    """Ends copies, a moment after they were begun, until it is left."""

    async def end():
        while True:
            await asyncio.sleep(0.002)
            side.finish()

    task = asyncio.create_task(end())
    try:
        yield
    finally:
        task.cancel()


async def plain_answers(model, requests, **how):
    async with real_pair(model, num_tokens=2048, **how) as pair:
        return [await answer(pair.decode, request) for request in requests]


def num_tokens_of(events):
    return sum(len(event.tokens) for event in events if isinstance(event, Tokens))


@pytest.mark.parametrize("kv_codec", ["native", "int8"])
@pytest.mark.parametrize("name", PACKS)
async def test_answers_are_those_of_plain_writing(model, name, kv_codec):
    if (name, kv_codec) == ("int8", "native"):
        kv_codec = "fp8_unscaled"
    requests = [greedy(prompt, 20, pack=PACKS[name], request_id=str(n)) for n, prompt in enumerate(PROMPTS)]
    expected = await plain_answers(model, requests, kv_codec=kv_codec)
    async with deferred_pair(model, kv_codec=kv_codec) as (pair, side), ending(side):
        assert await asyncio.gather(*(answer(pair.decode, request) for request in requests)) == expected
        assert side.num_begun == len(requests) * model.spec.num_layers
        assert side.num_held == 0


async def test_others_go_on_while_kv_arrives_and_it_is_not_read_before(model):
    running, arriving = greedy(PROMPTS[0], 300, request_id="running"), greedy(PROMPTS[1], 12, request_id="arriving")
    expected = await plain_answers(model, [running, arriving])
    async with deferred_pair(model) as (pair, side):
        early, late = [], []
        first = pair.decode.submit(running, early.append)
        await until(lambda: len(side.begun) == model.spec.num_layers)
        side.finish()
        await until(lambda: num_tokens_of(early) > 3)
        second = pair.decode.submit(arriving, late.append)
        await until(lambda: len(side.begun) == model.spec.num_layers)
        for _ in range(model.spec.num_layers):
            seen = num_tokens_of(early)
            await until(lambda seen=seen: num_tokens_of(early) > seen + 5)
            assert second.stage is Stage.FETCHING
            assert num_tokens_of(late) == 1  # of prefill
            side.finish(1)
        await until(lambda: first.stage is second.stage is Stage.CLOSED)
        assert [task.generated for task in (first, second)] == expected


async def test_pages_of_who_leaves_while_they_are_filled_go_to_others(model):
    """To a running answer, whose step comes after what is under way to them."""
    running = greedy(PROMPTS[0], 200, request_id="running")
    (expected,) = await plain_answers(model, [running])
    async with deferred_pair(model, num_tokens=480) as (pair, side):
        first = pair.decode.submit(running, lambda event: None)
        await until(lambda: len(side.begun) == model.spec.num_layers)
        side.finish()
        leaver = pair.decode.submit(greedy(PROMPTS[1], 50, request_id="leaver"), lambda event: None)
        await until(lambda: len(side.begun) == model.spec.num_layers)
        table = pair.decode._memory.table
        left = set(table.held(leaver.holding.row).tolist())
        pair.decode.cancel(leaver)
        pair.decode.check()
        assert side.num_held == 1
        await until(lambda: side.num_waiting == 1)
        assert first.stage is Stage.RUNNING
        side.finish()
        await until(lambda: left & set(table.held(first.holding.row).tolist()))
        await until(lambda: first.stage is Stage.CLOSED)
        assert first.generated == expected


async def test_an_answer_may_end_before_its_pages_are_there(model):
    async with deferred_pair(model) as (pair, _):
        tokens = await answer(pair.decode, greedy(PROMPTS[0], 1))
        assert len(tokens) == 1
        pair.decode.check()
        assert pair.decode.load().num_free_pages == pair.decode.load().num_total_pages


async def test_a_copy_that_fails_fails_its_request_and_no_other(model):
    request = greedy(PROMPTS[1], 12)
    expected = await plain_answers(model, [request])
    async with deferred_pair(model) as (pair, side):
        events = []
        failing = pair.decode.submit(request, events.append)
        await until(lambda: len(side.begun) == model.spec.num_layers)
        while side.begun:
            side.begun.popleft().fail()
        await until(lambda: failing.stage is Stage.CLOSED)
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, InternalError)
        assert "could not be copied to the device: the device is gone" in events[-1].error.message
        pair.decode._memory.uploads = Uploads(side, limit_bytes=LIMIT_BYTES)  # of a device that is there
        async with ending(side):
            assert await answer(pair.decode, request) == expected[0]


async def test_a_sender_is_not_read_from_while_there_is_no_room(model):
    request = greedy(PROMPTS[2], 12)
    expected = await plain_answers(model, [request])
    async with deferred_pair(model, limit_bytes=1) as (pair, side):
        task, layers = pair.decode.submit(request, lambda event: None), model.spec.num_layers
        for number in range(1, layers + 1):
            await until(lambda number=number: side.num_begun == number)
            assert len(side.begun) == 1
            side.finish()
        await until(lambda: task.stage is Stage.CLOSED)
        assert task.generated == expected[0]


async def test_a_deadline_ends_a_request_whose_copies_do_not_end(model):
    async with deferred_pair(model) as (pair, side):
        waiting = asyncio.create_task(collect(pair.decode, greedy(PROMPTS[0], 12)))
        await until(lambda: len(side.begun) == model.spec.num_layers)
        (task,) = pair.decode._roster.admitted
        pair.decode._overdue(task)
        _, event = await waiting
        assert isinstance(event, Failed)
        pair.decode.check()
