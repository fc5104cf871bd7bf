"""Real weights in three ranks: SmolLM2 has three KV heads, so each rank has one. Prefill or decode."""

import asyncio
from itertools import product

import pytest
import torch

from packlight.core.config_tree import build_config
from packlight.core.types import PackSpec
from packlight.engine.engine import LocalEngine, ParallelEngine
from packlight.engine.parallel.crew import Crew
from tests.support.engine_pair import pair_of_engines
from tests.support.fake_pair import answer
from tests.support.real_pair import greedy

pytestmark = pytest.mark.slow

RANKS, NUM_TOKENS = 3, 8
PACKS = (
    PackSpec(),
    PackSpec("snapkv", budget_tokens=96, window=16),
    PackSpec("rocketkv", budget_tokens=64, window=16),
)
STORY = "The mill stood by the river, and every morning the miller counted the sacks, {} of them. "


@pytest.fixture(scope="module")
def engines(smollm2, smollm2_model):
    config = build_config({}, ["model.dtype=float32"])  # attention by the compiled kernels, where they can be had
    crew = Crew(config, RANKS, torch.get_num_threads())
    divided = ParallelEngine(crew, crew.load(smollm2, config, print))
    yield config, {1: LocalEngine(smollm2_model, config), RANKS: divided}
    crew.close()


@pytest.fixture(scope="module")
def prompts(smollm2):
    story = "".join(STORY.format(number) for number in range(8))
    return [smollm2.tokenizer.encode(text) for text in (story + "So the miller", "Once upon a time,")]


async def test_three_ranks_say_what_one_says(engines, prompts):
    """Each way to pack beside the others, where three ranks prefill for one and where one prefills for three."""
    config, by_ranks = engines
    said = {}
    for ways in (1, 1), (RANKS, 1), (1, RANKS):
        async with pair_of_engines(config, *(by_ranks[num_ranks] for num_ranks in ways)) as decode:
            asked = [greedy(ids, NUM_TOKENS, pack=pack, request_id=f"{pack.recipe} {len(ids)}")
                     for pack, ids in product(PACKS, prompts)]  # fmt: skip
            answers = await asyncio.gather(*(answer(decode, request) for request in asked))
            said[ways] = {request.request_id: tokens for request, tokens in zip(asked, answers, strict=True)}
    assert said[RANKS, 1] == said[1, 1]
    assert said[1, RANKS] == said[1, 1]
