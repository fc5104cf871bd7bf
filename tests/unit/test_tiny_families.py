"""Whole answers of tiny random models of every family, through prefill, packing, shipping and decode.

Sliding-window layers ship only what their attention can see, MoE layers route each token for itself: the tokens must be
those of plain transformers all the same. And a selection must not depend on chunking, batching or prefix hits.
"""

import asyncio

import pytest
import torch

from packlight.compress.layout import pages_of
from packlight.compress.recipes import RECIPES
from packlight.core.config import DType, ModelConfig
from packlight.core.shipping import Chunk, FirstToken, LayerHeader, Shipped
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.models.opened import open_model
from tests.support.fake_pair import answer
from tests.support.real_pair import greedy, real_pair
from tests.support.tiny_models import TINY_CONFIGS, eager_model, sharp_llama, write_model_folder

MAX_TOKENS = 12
PROMPTS = [[5 + (7 * i * i + 3 * i) % 240 for i in range(n)] for n in (1, 19, 75)]


@pytest.fixture(scope="module", params=sorted(TINY_CONFIGS))
def family(request, tmp_path_factory):
    """(transformers' model in eager attention, ours)."""
    eager = eager_model(request.param)
    folder = write_model_folder(tmp_path_factory.mktemp(request.param), eager)
    config = ModelConfig(path=str(folder.path), dtype=DType.FLOAT32)
    opened = open_model(config, on_progress=print)
    return eager, build_model(opened, config, Role.DECODE, on_progress=print)


def eager_answer(eager, prompt):
    ids = list(prompt)
    for _ in range(MAX_TOKENS):
        with torch.inference_mode():
            ids.append(int(eager(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


async def test_every_family_answers_as_transformers_does(family):
    eager, model = family
    expected = [eager_answer(eager, prompt) for prompt in PROMPTS]
    async with real_pair(model, chunk_tokens=16, num_tokens=1024) as pair:
        together = [answer(pair.decode, greedy(p, MAX_TOKENS, request_id=str(i))) for i, p in enumerate(PROMPTS)]
        assert await asyncio.gather(*together) == expected
        assert [await answer(pair.decode, greedy(p, MAX_TOKENS)) for p in PROMPTS] == expected  # from the cache


# ── selection ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", name="sharp_llama")
def sharp_model(tmp_path_factory):
    return sharp_llama(tmp_path_factory.mktemp("sharp"), 4)


async def shipment(pair, prompt, pack):
    """What one prefill ships: (lengths by layer, kept keys by layer and head, first token, cached tokens)."""
    request = PrefillRequest("r", tuple(prompt), len(prompt), SamplingParams(temperature=0.0), pack)
    lengths, payloads, first, cached = [], [], None, 0
    async for event in pair.prefill.prefill(request):
        match event:
            case LayerHeader():
                lengths.append(event.lengths)
                payloads.append(b"")
            case Chunk():
                payloads[-1] += bytes(event.data)
            case FirstToken():
                first, cached = event.token.token_id, event.num_cached_tokens
            case Shipped():
                pass
    return lengths, [kept_keys(payload, each) for payload, each in zip(payloads, lengths, strict=True)], first, cached


def kept_keys(payload, lengths, page_size=16, head_dim=32):
    """The keys of each head, without the tails of last pages; each K page comes before its V page."""
    pages = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(-1, 2, page_size, head_dim)[:, 0]
    heads, start = [], 0
    for length in lengths:
        end = start + pages_of(length, page_size)
        heads.append(pages[start:end].flatten(0, 1)[:length])
        start = end
    return heads


@pytest.mark.parametrize(
    "pack",
    [
        PackSpec("snapkv", budget_tokens=40, window=8, kernel=7),
        PackSpec("snapkv", ratio=0.3, window=32, sinks=0),
        PackSpec("snapkv", budget_tokens=40, window=8, mass_floor=0.9),
        PackSpec(),
        *(PackSpec(name, budget_tokens=40, window=8) for name, recipe in RECIPES.items() if recipe.has_budget),
    ],
    ids=lambda pack: f"{pack.recipe}-{pack.window}-{pack.mass_floor}",
)
async def test_a_selection_does_not_depend_on_chunks_batches_or_hits(sharp_llama, pack):
    prompt = [5 + (11 * i * i + i) % 240 for i in range(150)]
    others = [[9 + i] * (20 + 30 * i) for i in range(4)]
    async with real_pair(sharp_llama, chunk_tokens=1000, num_tokens=4096) as pair:
        lengths, keys, first, cached = await shipment(pair, prompt, pack)
        assert cached == 0
        hit = await shipment(pair, prompt, pack)
        assert hit[3] == 0 if RECIPES[pack.recipe].needs_all_queries else hit[3] >= 96
    variants = {"prefix hit": hit}
    for chunk_tokens in (16, 37, 64):
        async with real_pair(sharp_llama, chunk_tokens=chunk_tokens, num_tokens=4096) as pair:
            results = await asyncio.gather(shipment(pair, prompt, pack), *(shipment(pair, o, pack) for o in others))
            variants[f"chunks of {chunk_tokens}, batched"] = results[0]
    for name, variant in variants.items():
        assert variant[0] == lengths, name
        assert variant[2] == first, name
        for layer, heads in enumerate(keys):
            for ours, theirs in zip(heads, variant[1][layer], strict=True):
                torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
