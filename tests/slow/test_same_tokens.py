"""At temperature 0 and recipe none, prefill + ship + decode says token for token what plain transformers says.

Likewise batched with others, with prefix hits, and with any chunk size.
"""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from packlight.core.types import PackSpec
from tests.support.fake_pair import answer, collect
from tests.support.real_pair import greedy, real_pair

pytestmark = pytest.mark.slow
MAX_TOKENS = 24
STORY = (
    "The mill stood by the river, and every morning the miller counted the sacks, {} of them, before the carts came. "
)


def prompts(tokenizer):
    """Short, long, shared prefixes, several turns."""
    document = "".join(STORY.format(i) for i in range(115))

    def chat(*texts):
        roles = ["user", "assistant"]
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    return {
        "one word": chat("Hi"),
        "question": chat("What is the capital of France?"),
        "code": chat("Write a Python function that reverses a string."),
        "two turns": chat("Name a colour.", "Blue.", "And another one, please."),
        "two turns, other end": chat("Name a colour.", "Blue.", "And an animal, please."),
        "text": tokenizer.encode("Once upon a time, in a village by the sea,"),
        "document, question 1": chat(document + "\nHow many sacks did the miller count first?"),
        "document, question 2": chat(document + "\nWhat stood by the river?"),
    }


@pytest.fixture(scope="module")
def cases(smollm2):
    """name -> (prompt ids, what transformers generates)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.folder.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    expected = {}
    for name, ids in prompts(smollm2.tokenizer).items():
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=MAX_TOKENS,
                min_new_tokens=MAX_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
            )
        expected[name] = (ids, out[0, len(ids) :].tolist())
    return expected


def request_for(ids, name, **kwargs):
    # transformers' min_new_tokens bans the ends, so ours does too.
    stop = {"eos_token_ids": (0, 2), "ignore_eos": False, "min_tokens": MAX_TOKENS}
    return greedy(ids, MAX_TOKENS, request_id=name, stop=stop, **kwargs)


def test_the_prompts_cover_the_claim(cases):
    lengths = [len(ids) for ids, _ in cases.values()]
    assert len(lengths) >= 8
    assert min(lengths) < 40
    assert max(lengths) > 3000


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
async def test_one_at_a_time_then_again_with_prefix_hits(smollm2_model, cases, attention):
    """`cpu` is the compiled kernels, in float32 here as everything is."""
    async with real_pair(smollm2_model, attention=attention) as pair:
        for name, (ids, expected) in cases.items():
            assert await answer(pair.decode, request_for(ids, name)) == expected, name
        for name, (ids, expected) in cases.items():
            tokens, event = await collect(pair.decode, request_for(ids, name))
            assert tokens == expected, name
            assert event.usage.num_cached_tokens >= len(ids) - 32


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
