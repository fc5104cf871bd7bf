"""Clients that leave at any moment, while others stay: those that stay get what they would have got alone, and nothing
is left behind. With the compiled kernels, two threads of which write into one pool.
"""

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from packlight.core.config import ModelConfig
from packlight.core.types import Finished, PackSpec, SamplingParams, Tokens
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.models.opened import open_model
from tests.support.fake_pair import answer
from tests.support.real_pair import greedy, real_pair

pytestmark = pytest.mark.slow
NUM_REQUESTS, MAX_TOKENS = 18, 16
PACKS = (PackSpec(), PackSpec("snapkv", budget_tokens=64), PackSpec("quest", budget_tokens=64))


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(path="smollm2", dtype="bfloat16")
    return build_model(open_model(config, on_progress=print), config, Role.DECODE, on_progress=print)


def requests_for(chance: random.Random):
    """Prompts that share beginnings, packed in all ways, some sampled."""
    shared = [chance.randrange(20, 40_000) for _ in range(300)]
    for number in range(NUM_REQUESTS):
        prompt = shared[: chance.choice([0, 40, 150, 300])] + [chance.randrange(20, 40_000) for _ in range(30)]
        request = greedy(prompt, MAX_TOKENS, request_id=str(number), pack=PACKS[number // 3 % len(PACKS)])
        yield request if number % 2 else with_noise(request, seed=number)


def with_noise(request, seed):
    return replace(request, sampling=SamplingParams(temperature=0.8, seed=seed))


async def leave_after(worker, request, num_tokens: int) -> None:
    seen = 0
    async with aclosing(worker.generate(request)) as events:
        async for event in events:
            seen += len(event.tokens) if isinstance(event, Tokens) else 0
            if seen >= num_tokens or isinstance(event, Finished):
                return


async def test_who_stays_does_not_notice_who_leaves(model):
    chance = random.Random(4)
    asked = list(requests_for(chance))
    async with real_pair(model, attention="cpu", num_tokens=20_000) as pair:
        alone = [await answer(pair.decode, request) for request in asked[::3]]
    async with real_pair(model, attention="cpu", num_tokens=20_000, chunk_tokens=64) as pair:
        leaving = [
            asyncio.create_task(leave_after(pair.decode, request, chance.randrange(MAX_TOKENS)))
            for number, request in enumerate(asked)
            if number % 3
        ]
        staying = [asyncio.create_task(answer(pair.decode, request)) for request in asked[::3]]
        for task in leaving[::4]:
            await asyncio.sleep(0)  # some leave before anything was done for them
            task.cancel()
        together = await asyncio.gather(*staying)
        await asyncio.gather(*leaving, return_exceptions=True)
    assert together == alone
