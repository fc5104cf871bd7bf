"""Real weights in three ranks: SmolLM2 has three KV heads, so each rank has one. Prefill, decode, or both."""

import asyncio

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

RANKS, NUM_TOKENS = 3, 12
PACKS = {
    "none": PackSpec(),
    "snapkv": PackSpec("snapkv", budget_tokens=96, window=16),
    "rocketkv": PackSpec("rocketkv", budget_tokens=64, window=16),
}
STORY = "The mill stood by the river, and every morning the miller counted the sacks, {} of them. "


@pytest.fixture(scope="module")
def engines(smollm2, smollm2_model):
    config = build_config({}, ["model.dtype=float32"])  # attention by the compiled kernels, where they can be had
    crew = Crew(smollm2, config, RANKS, torch.get_num_threads(), print)
    yield config, {1: LocalEngine(smollm2_model, config), RANKS: ParallelEngine(crew)}
    crew.close()


@pytest.mark.parametrize("recipe", PACKS)
async def test_three_ranks_say_what_one_says(engines, smollm2, recipe):
    config, by_ranks = engines
    story = "".join(STORY.format(number) for number in range(12))
    prompts = [smollm2.tokenizer.encode(text) for text in (story + "So the miller", "Once upon a time,")]
    said = {}
    for ways in ((1, 1), (RANKS, 1), (1, RANKS), (RANKS, RANKS)):
        async with pair_of_engines(config, by_ranks[ways[0]], by_ranks[ways[1]]) as decode:
            requests = [greedy(ids, NUM_TOKENS, pack=PACKS[recipe], request_id=str(len(ids))) for ids in prompts]
            said[ways] = await asyncio.gather(*(answer(decode, request) for request in requests))
    assert all(answers == said[1, 1] for answers in said.values()), said
