"""At temperature 0 and recipe none, prefill + ship + decode says token for token what plain transformers says.

Likewise batched with others, with prefix hits, and with any chunk size.
"""

import asyncio

import pytest
import torch

from packlight.core.types import PackSpec
from tests.support.fake_pair import answer, collect
from tests.support.plain_answers import recorded
from tests.support.real_pair import PAGE, greedy, real_pair

pytestmark = pytest.mark.slow
LONG = 1000
# Asked alone: less than a page, two that share a beginning, a tale of many pages, and documents that share most.
ALONE = ("text", "two turns", "two turns, other end", "tale", "document, question 1", "document, question 2")
NUM_TOKENS = PAGE  # as many as make every answer begin a page, wherever its prompt ended


@pytest.fixture(scope="module")
def cases(smollm2):
    """name -> (prompt ids, what transformers generates)."""
    return {name: (plain.ids, plain.answer[:NUM_TOKENS]) for name, plain in recorded(smollm2.tokenizer).items()}


def request_for(ids, name, **kwargs):
    # transformers' min_new_tokens bans the ends, so ours does too.
    stop = {"eos_token_ids": (0, 2), "ignore_eos": False, "min_tokens": NUM_TOKENS}
    return greedy(ids, NUM_TOKENS, request_id=name, stop=stop, **kwargs)


def test_the_prompts_cover_the_claim(cases):
    lengths = [len(ids) for ids, _ in cases.values()]
    assert len(lengths) >= 8
    assert min(lengths) < 40
    assert max(lengths) > 2100  # many chunks of any size below, and more than twice what kernels read in one piece


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
async def test_one_at_a_time_then_again_with_prefix_hits(smollm2_model, cases, attention):
    """`cpu` is the compiled kernels, in float32 here as everything is. The longest prompts, which take `sdpa` the
    longest, it answers below. Beside the prompts that come again are others that nobody has asked before."""
    chosen = {name: case for name, case in cases.items() if attention == "cpu" or len(case[0]) < LONG}
    alone = [name for name in chosen if name in ALONE]
    async with real_pair(smollm2_model, attention=attention) as pair:
        for name in alone:
            ids, expected = chosen[name]
            assert await answer(pair.decode, request_for(ids, name)) == expected, name
        again = await asyncio.gather(*(collect(pair.decode, request_for(ids, n)) for n, (ids, _) in chosen.items()))
    for (name, (ids, expected)), (tokens, event) in zip(chosen.items(), again, strict=True):
        assert tokens == expected, name
        assert name not in alone or event.usage.num_cached_tokens >= len(ids) - 32


@pytest.mark.parametrize("chunk_tokens", [48, 1000])
async def test_all_at_once_in_any_chunks(smollm2_model, cases, chunk_tokens):
    """Prompts share chunks, answers share steps."""
    chosen = {name: case for name, case in cases.items() if chunk_tokens > 100 or len(case[0]) < 200}
    async with real_pair(smollm2_model, chunk_tokens=chunk_tokens, num_tokens=12_000) as pair:
        names = list(chosen)
        answers = await asyncio.gather(*(answer(pair.decode, request_for(chosen[n][0], n)) for n in names))
    for name, tokens in zip(names, answers, strict=True):
        assert tokens == chosen[name][1], name


async def test_a_budget_that_covers_the_prompt_is_exactly_none(smollm2_model, cases):
    ids, expected = cases["two turns"]
    async with real_pair(smollm2_model) as pair:
        exact = await answer(pair.decode, request_for(ids, "none"))
        logits = [step.clone() for step in pair.decode_logits]
        pair.decode_logits.clear()
        packed = PackSpec("snapkv", budget_tokens=len(ids))
        # Another tenant, so that both prompts are computed whole and the logits can be equal to the last bit.
        other = request_for(ids, "snapkv", pack=packed, cache_salt="other")
        assert await answer(pair.decode, other) == exact == expected
        assert all(torch.equal(a, b) for a, b in zip(logits, pair.decode_logits, strict=True))
