"""Packed KV on the real model: the logits are those of masked dense attention, and the needle is still found."""

import pytest
import torch

from packlight.core.types import PackSpec
from tests.support.fake_pair import answer, collect
from tests.support.real_pair import PAGE, EvictingAttention, MaskedAttention, greedy, real_pair

pytestmark = pytest.mark.slow
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def needle_prompt(tokenizer, num_sentences, depth, number):
    """A number hidden in filler, asked for at the end; the answer's beginning is given, as in RULER."""
    needle = f"One of the special magic numbers for quiet-river is: {number}. "
    sentences = [FILLER] * num_sentences
    sentences.insert(int(depth * num_sentences), needle)
    text = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{''.join(sentences)}\nWhat is the special magic number for quiet-river "
        "mentioned in the provided text?"
    )
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return ids + tokenizer.encode("The special magic number for quiet-river mentioned in the provided text is")


@pytest.mark.parametrize(
    ("pack", "chunk_tokens"),
    [
        (PackSpec("snapkv", budget_tokens=96, window=16, sinks=4, kernel=15), 100),
        (PackSpec("snapkv", budget_tokens=160, window=32, sinks=0, kernel=63), 512),
        (PackSpec("none"), 100),
    ],
    ids=["96-100", "160-512", "none-100"],
)
async def test_decode_logits_are_those_of_masked_dense_attention(smollm2, smollm2_model, pack, chunk_tokens):
    ids = needle_prompt(smollm2.tokenizer, 8, 0.4, 8015764)
    assert len(ids) > 250
    async with real_pair(smollm2_model, chunk_tokens=chunk_tokens, num_tokens=2048) as pair:
        tokens, event = await collect(pair.decode, greedy(ids, 8, pack=pack))
    oracle = MaskedAttention(len(ids), pack)
    everything = torch.tensor([*ids, *tokens[:-1]])
    rows = torch.arange(len(ids), len(everything))
    with torch.inference_mode():
        expected = smollm2_model.forward(everything, torch.arange(len(everything)), oracle, rows)
    got = torch.cat(pair.decode_logits)
    assert (got - expected).abs().max().item() < 1e-4
    kept = [len(head) for layer in oracle.kept for head in layer]
    assert event.usage.kv.num_kept_tokens == sum(kept) / len(kept)


async def test_the_needle_is_found_in_a_packed_kv(smollm2, smollm2_model):
    """Selected while the prompt is computed, then again and again from the exact KV that stayed behind: kept, and read.

    Quest reads a quarter of the pages here and RocketKV an eighth, at which this model is at its limit: of five needles
    at other depths and numbers it finds, at this budget, three with Quest or FreeKV, four with RocketKV, and all five
    with SnapKV."""
    number = "6640218"
    ids = needle_prompt(smollm2.tokenizer, 86, 0.65, number)
    assert 1900 < len(ids) < 2300
    async with real_pair(smollm2_model, num_tokens=4096) as pair:
        for times_smaller in (8, 4, 1):
            pack = PackSpec("snapkv", ratio=1 / times_smaller) if times_smaller > 1 else PackSpec()
            tokens, event = await collect(pair.decode, greedy(ids, 10, pack=pack))
            assert number in smollm2.tokenizer.decode(tokens), times_smaller
            assert (event.usage.num_cached_tokens > 0) == (times_smaller < 8)
            usage = event.usage.kv
            assert usage.shipped_bytes <= usage.exact_bytes / times_smaller * 1.05
            assert usage.retained_mass is not None
            assert usage.retained_mass > 0.5
        for recipe, times_fewer in (("rocketkv", 8), ("quest", 4)):
            tokens, event = await collect(pair.decode, greedy(ids, 10, pack=PackSpec(recipe, ratio=0.25, kernel=63)))
            assert number in smollm2.tokenizer.decode(tokens), recipe
            assert event.usage.kv.num_read_tokens <= len(ids) / times_fewer + 1
            assert event.usage.kv.num_kept_tokens > 2 * event.usage.kv.num_read_tokens


async def test_h2o_evicts_while_it_decodes_as_plain_python_does(smollm2, smollm2_model):
    """Every step's logits, with 64 of 200 tokens kept and one evicted for each that is generated."""
    ids = needle_prompt(smollm2.tokenizer, 4, 0.4, 8015764)
    assert len(ids) > 190
    pack = PackSpec("h2o", budget_tokens=64, window=16, params=(("evict", 1.0),))
    async with real_pair(smollm2_model, num_tokens=2048) as pair:
        tokens, event = await collect(pair.decode, greedy(ids, 24, pack=pack))
    oracle = EvictingAttention(len(ids), budget=64, num_recent=32, num_sinks=pack.sinks, window=16)
    everything = torch.tensor([*ids, *tokens[:-1]])
    with torch.inference_mode():
        rows = torch.arange(len(ids), len(everything))
        expected = smollm2_model.forward(everything, torch.arange(len(everything)), oracle, rows)
    assert (torch.cat(pair.decode_logits) - expected).abs().max().item() < 1e-3
    assert event.usage.kv.num_kept_tokens == 64


async def test_reading_every_page_is_exact(smollm2, smollm2_model):
    ids = needle_prompt(smollm2.tokenizer, 8, 0.4, 8015764)
    async with real_pair(smollm2_model, num_tokens=2048) as pair:
        answers = {}
        for recipe in ("none", "quest", "freekv", "rocketkv"):
            pack = PackSpec(recipe, budget_tokens=len(ids)) if recipe != "none" else PackSpec()
            answers[recipe] = await collect(pair.decode, greedy(ids, PAGE, pack=pack))
    exact, _ = answers.pop("none")
    for recipe, (tokens, event) in answers.items():
        assert tokens == exact, recipe
        assert event.usage.kv.num_read_tokens == event.usage.kv.num_kept_tokens == len(ids)


async def test_int8_in_memory_says_what_exact_kv_says(smollm2, smollm2_model):
    """These logits deviate by 6.9; measured, int8 moves them by 0.28 at most and 0.05 in the mean square."""
    ids = needle_prompt(smollm2.tokenizer, 18, 0.4, 8015764)
    steps, answers, pages = [], [], []
    for kv_codec in ("native", "int8"):
        async with real_pair(smollm2_model, num_tokens=2048, kv_codec=kv_codec) as pair:
            answers.append(await answer(pair.decode, greedy(ids, 24)))
            steps.append(torch.cat(pair.decode_logits))
            pages.append((pair.decode._memory.pool.head_page_bytes, pair.decode.load().num_total_pages))
    assert answers[0] == answers[1]
    assert (steps[0] - steps[1]).abs().max() < 1.0
    assert pages[1][0] == 2368
    assert pages[1][0] < 0.3 * pages[0][0]
    assert pages[1][1] > 2 * pages[0][1]
