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
# Each recipe, and how many ranks prefill and decode: one side alone where a recipe does its work there.
CASES = {
    "none": (PackSpec(), [(RANKS, 1), (1, RANKS), (RANKS, RANKS)]),
    "snapkv": (PackSpec("snapkv", budget_tokens=96, window=16), [(RANKS, 1), (RANKS, RANKS)]),
    "rocketkv": (PackSpec("rocketkv", budget_tokens=64, window=16), [(1, RANKS), (RANKS, RANKS)]),
}
STORY = "The mill stood by the river, and every morning the miller counted the sacks, {} of them. "


@pytest.fixture(scope="module")
def engines(smollm2, smollm2_model):
    config = build_config({}, ["model.dtype=float32"])  # attention by the compiled kernels, where they can be had
    crew = Crew(smollm2, config, RANKS, torch.get_num_threads(), print)
    yield config, {1: LocalEngine(smollm2_model, config), RANKS: ParallelEngine(crew)}
    crew.close()


@pytest.mark.parametrize(("pack", "ways"), CASES.values(), ids=CASES)
async def test_three_ranks_say_what_one_says(engines, smollm2, pack, ways):
    config, by_ranks = engines
    story = "".join(STORY.format(number) for number in range(12))
    prompts = [smollm2.tokenizer.encode(text) for text in (story + "So the miller", "Once upon a time,")]
    said = {}
    for prefill_ranks, decode_ranks in ((1, 1), *ways):
        async with pair_of_engines(config, by_ranks[prefill_ranks], by_ranks[decode_ranks]) as decode:
            requests = [greedy(ids, NUM_TOKENS, pack=pack, request_id=str(len(ids))) for ids in prompts]
            answers = await asyncio.gather(*(answer(decode, request) for request in requests))
            said[prefill_ranks, decode_ranks] = answers
    assert all(answers == said[1, 1] for answers in said.values()), said
