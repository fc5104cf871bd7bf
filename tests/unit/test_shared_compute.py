"""Prefill and decode on one compute thread, with the arithmetic model: what running answers notice of a long prompt."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from math import ceil

import pytest

from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.types import PackSpec
from packlight.engine.compute import Compute
from packlight.models.fake import fake_answer
from packlight.prefill.scheduler import LEAST_PAGES
from tests.support.fake_pair import PAGE, answer, fake_pair, make_request, until

SHORT, LONG = [7, 8, 9], [number % 50 + 1 for number in range(200)]
NUM_CUT = ceil(len(LONG) / (LEAST_PAGES * PAGE))  # steps of LONG while something decodes


def as_little_as_can_be() -> Compute:
    """Whatever a step computes takes longer than this, so it computes the least there is."""
    return Compute(max_stall_s=1e-9)


async def test_a_prompt_alone_is_computed_in_whole_chunks():
    async with fake_pair(shared=as_little_as_can_be(), prefill=PrefillConfig(chunk_tokens=100)) as pair:
        assert await answer(pair.decode, make_request(SHORT, 1, request_id="a")) == fake_answer(SHORT, 1)
        assert await answer(pair.decode, make_request(LONG, 1, request_id="b")) == fake_answer(LONG, 1)
        assert pair.prefill_gate.num_steps == 1 + 2


async def test_the_first_step_of_a_worker_measures_it_and_is_small():
    """How long a whole chunk takes is not known yet: with a large model on a few cores it may be minutes."""
    async with fake_pair(prefill=PrefillConfig(chunk_tokens=1000)) as pair:
        assert await answer(pair.decode, make_request(LONG, 1)) == fake_answer(LONG, 1)
        assert pair.prefill_gate.num_steps == 2


async def test_while_an_answer_runs_a_long_prompt_is_cut_and_takes_turns_with_it():
    async with fake_pair(shared=as_little_as_can_be(), decode_blocks=256) as pair:
        running = asyncio.create_task(answer(pair.decode, make_request(SHORT, 150, request_id="a")))
        await until(lambda: pair.decode_gate.num_steps >= 5)
        assert await answer(pair.decode, make_request(LONG, 4, request_id="b")) == fake_answer(LONG, 4)
        assert not running.done()
        assert await running == fake_answer(SHORT, 150)
        steps = pair.decode_gate.steps
    assert steps.count("prefill") == 1 + NUM_CUT
    first = steps.index("prefill", 1)
    last = len(steps) - steps[::-1].index("prefill")
    turns = steps[first:last]
    assert ("prefill", "prefill") not in pairwise(turns)


async def test_whatever_becomes_of_the_answer_the_prompt_is_computed():
    async with fake_pair(shared=as_little_as_can_be(), decode_blocks=256) as pair:
        running = asyncio.create_task(answer(pair.decode, make_request(SHORT, 150, request_id="a")))
        await until(lambda: pair.decode_gate.num_steps >= 5)
        waiting = asyncio.create_task(answer(pair.decode, make_request(LONG, 4, request_id="b")))
        await until(lambda: pair.prefill_gate.num_steps >= 3)
        running.cancel()
        assert await waiting == fake_answer(LONG, 4)
        await asyncio.gather(running, return_exceptions=True)


async def test_a_prompt_that_follows_one_is_cut_though_the_first_one_s_answer_only_begins():
    """Its KV may still be on its way when the next chunk is planned: the second token must not wait for a whole one."""
    shared = as_little_as_can_be()
    async with fake_pair(shared=shared, decode_blocks=256, prefill=PrefillConfig(max_prompts=1)) as pair:
        pair.prefill_gate.is_open = False
        answers = [
            asyncio.create_task(answer(pair.decode, make_request(prompt, 60, request_id=str(len(prompt)))))
            for prompt in (SHORT, LONG)
        ]
        await until(lambda: pair.prefill.num_unfinished == 2)
        await until(lambda: shared.max_prefill_s is not None)  # the short one's only chunk is being computed
        pair.prefill_gate.let_all()
        assert [await one for one in answers] == [fake_answer(prompt, 60) for prompt in (SHORT, LONG)]
        assert pair.prefill_gate.num_steps == 1 + NUM_CUT


@pytest.mark.parametrize("window", [1, 8, 32])
async def test_cut_chunks_keep_the_window_in_one_step(window):
    pack = PackSpec("snapkv", budget_tokens=100, window=window, sinks=4)
    async with fake_pair(shared=as_little_as_can_be(), decode_blocks=256) as pair:
        alone = await answer(pair.decode, make_request(LONG, 6, request_id="alone", pack=pack, cache_salt="other"))
        running = asyncio.create_task(answer(pair.decode, make_request(SHORT, 200, request_id="a")))
        await until(lambda: pair.decode_gate.num_steps >= 10)
        assert await answer(pair.decode, make_request(LONG, 6, request_id="b", pack=pack)) == alone
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_many_requests_and_cancellations_on_one_thread():
    """Whatever the turns, every answer is the one that arithmetic has, and the books balance in the end."""
    shared, decode = Compute(max_stall_s=1e-5), DecodeConfig(max_batch=3)
    async with fake_pair(shared=shared, decode=decode, decode_blocks=256) as pair:
        prompts = [[number % 40 + 1] * (5 + 11 * (number % 9)) for number in range(40)]
        tasks = [
            asyncio.create_task(answer(pair.decode, make_request(prompt, 10, request_id=str(number))))
            for number, prompt in enumerate(prompts)
        ]
        for number in range(0, 40, 3):
            await asyncio.sleep(0.002)
            tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for prompt, tokens in zip(prompts, results, strict=True):
        assert isinstance(tokens, asyncio.CancelledError) or tokens == fake_answer(prompt, 10)
    assert sum(isinstance(tokens, list) for tokens in results) >= 26
