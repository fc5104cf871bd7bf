"""What a decode worker does with packed KV, on tiny random models with several layers and heads: page-sparse reading,
eviction while decoding, and KV that lies coded."""

import asyncio
from dataclasses import replace

import pytest
import torch

from packlight.compress.readers.shared import Readers
from packlight.core.config import DecodeConfig, DType, ModelConfig
from packlight.core.errors import ConfigError
from packlight.core.types import PackSpec
from packlight.core.workers import Role
from packlight.engine.build import build_model, packed_pool
from packlight.kv.coded import CodedPool
from packlight.models.fake_spec import fake_spec
from packlight.models.opened import open_model
from tests.support.fake_pair import answer, collect
from tests.support.real_pair import EvictingAttention, greedy, real_pair
from tests.support.tiny_models import eager_model, write_model_folder

PROMPT = [5 + (7 * i * i + 3 * i) % 240 for i in range(150)]
SPARSE = {
    "quest": PackSpec("quest", budget_tokens=48, params=(("dense_layers", 1.0),)),
    "freekv": PackSpec("freekv", budget_tokens=48),
    "rocketkv": PackSpec("rocketkv", budget_tokens=100, window=8, kernel=3),
}


def load(family, folder, sharpness=4.0):
    """Random weights alone attend almost evenly; sharper ones have preferences."""
    eager = eager_model(family)
    with torch.no_grad():
        for layer in eager.model.layers:
            layer.self_attn.q_proj.weight *= sharpness
    written = write_model_folder(folder, eager)
    config = ModelConfig(path=str(written.path), dtype=DType.FLOAT32)
    return build_model(open_model(config, on_progress=print), config, Role.DECODE, on_progress=print)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory):
    return load("llama", tmp_path_factory.mktemp("even"), sharpness=1.0)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Two of three layers see a window of 5 tokens only."""
    return load("gemma3", tmp_path_factory.mktemp("gemma"))


async def logits_of(model, pack, num_tokens=12, *, kv_codec="native", prompt=PROMPT):
    """(tokens, decode logits [steps, V], usage of the KV)."""
    async with real_pair(model, num_tokens=1024, kv_codec=kv_codec) as pair:
        tokens, event = await collect(pair.decode, greedy(prompt, num_tokens, pack=pack))
        return tokens, torch.cat(pair.decode_logits), event.usage.kv


def teacher_forced(model, prompt, tokens, attention):
    """The logits after each of `tokens` but the last, with `attention` over the whole sequence in one pass."""
    everything = torch.tensor([*prompt, *tokens[:-1]])
    rows = torch.arange(len(prompt), len(everything))
    with torch.inference_mode():
        return model.forward(everything, torch.arange(len(everything)), attention, rows)


# ── page-sparse reading ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("recipe", SPARSE)
async def test_a_budget_that_covers_the_prompt_reads_everything(llama, recipe):
    whole = PackSpec(recipe, budget_tokens=len(PROMPT), window=8)
    expected, exact, _ = await logits_of(llama, PackSpec())
    tokens, logits, usage = await logits_of(llama, whole)
    assert tokens == expected
    assert torch.equal(logits, exact)
    assert usage.num_read_tokens == len(PROMPT)


@pytest.mark.parametrize("recipe", SPARSE)
async def test_a_small_budget_reads_less_and_says_so(llama, recipe):
    _, exact, _ = await logits_of(llama, PackSpec())
    _, logits, usage = await logits_of(llama, SPARSE[recipe])
    assert usage.num_read_tokens < usage.num_kept_tokens
    assert (logits[0] - exact[0]).abs().max() > 1e-3, "some pages were not read"
    assert logits.isfinite().all()


async def test_readers_of_one_batch_do_not_disturb_each_other(llama, monkeypatch):
    """Rows are used again, by other readers; what a reader remembered of a row is gone with it."""
    forgotten = []
    forget = Readers.forget
    monkeypatch.setattr(Readers, "forget", lambda self, row: (forgotten.append(row), forget(self, row))[1])
    packs = [*SPARSE.values(), PackSpec()]
    alone = [(await logits_of(llama, pack))[0] for pack in packs]
    async with real_pair(llama, num_tokens=4096) as pair:
        for turn in range(2):
            requests = [greedy(PROMPT, 12, pack=pack, request_id=f"{turn}-{i}") for i, pack in enumerate(packs)]
            assert await asyncio.gather(*(answer(pair.decode, request) for request in requests)) == alone
            packs, alone = packs[::-1], alone[::-1]
    assert set(forgotten) == {0, 1, 2, 3}


async def test_no_summary_is_made_for_those_who_read_everything(llama):
    async with real_pair(llama, num_tokens=1024) as pair:
        await answer(pair.decode, greedy(PROMPT, 4))
        assert not pair.decode._memory.summaries._bounds_NE.any()
        await answer(pair.decode, greedy(PROMPT, 4, pack=SPARSE["quest"]))
        assert pair.decode._memory.summaries._bounds_NE.any()


# ── eviction while decoding ──────────────────────────────────────────────────────────────────────────────────────────


async def check_against_plain_h2o(model, budget, recent):
    """Logits of every step equal attention over the same tokens in plain Python."""
    params = (("evict", 1.0), ("recent", recent))
    pack = PackSpec("h2o", budget_tokens=budget, window=8, sinks=3, params=params)
    tokens, logits, _ = await logits_of(model, pack, num_tokens=24)
    oracle = EvictingAttention(len(PROMPT), budget=budget, num_recent=int(recent * budget), num_sinks=3, window=8)
    assert (logits - teacher_forced(model, PROMPT, tokens, oracle)).abs().max() < 2e-4


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize(("budget", "recent"), [(40, 0.5), (37, 0.2)])
async def test_evicted_tokens_are_those_of_the_obvious_h2o(family, budget, recent, request):
    await check_against_plain_h2o(request.getfixturevalue(family), budget, recent)


async def test_a_prompt_within_its_budget_is_evicted_from_by_its_own_mass(llama):
    """150 tokens of 160: eviction starts while decoding."""
    await check_against_plain_h2o(llama, 160, 0.25)


async def test_evicting_takes_no_page_for_the_answer(llama):
    for evict, num_pages in ((0.0, 3 * 2 * 8), (1.0, 3 * 2 * 3)):
        pack = PackSpec("h2o", budget_tokens=48, window=8, params=(("evict", evict),))
        async with real_pair(llama, num_tokens=1024) as pair:
            pair.decode._runner.backend = spy = Spy(pair.decode._runner.backend, pair.decode)
            await answer(pair.decode, greedy(PROMPT, 80, pack=pack))
            assert {load.num_total_pages - load.num_free_pages for load in spy.loads} == {num_pages}


class Spy:
    """An attention backend that asks the worker for its load before each step."""

    def __init__(self, backend, worker):
        self._backend, self._worker, self.loads = backend, worker, []

    def plan(self, batch):
        self.loads.append(self._worker.load())
        return self._backend.plan(batch)


# ── KV that lies coded ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kv_codec", "tolerance"), [("fp8", 0.1), ("int8", 0.02), ("int4", 0.25)])
async def test_a_coded_pool_answers_nearly_as_an_exact_one(even_llama, kv_codec, tolerance):
    """The root of the mean squared difference, as long as the tokens are the same. These logits deviate by 1.2."""
    tokens, exact, _ = await logits_of(even_llama, PackSpec(), 40)
    got_tokens, logits, _ = await logits_of(even_llama, PackSpec(), 40, kv_codec=kv_codec)
    num_same = next((i for i, (a, b) in enumerate(zip(tokens, got_tokens, strict=True)) if a != b), 40)
    assert num_same >= 2
    error = (logits[:num_same] - exact[:num_same]).pow(2).mean().sqrt()
    assert tolerance / 10 < error < tolerance, error


@pytest.mark.parametrize(
    ("kv_codec", "recipe"), [("int4", "none"), ("turboquant3", "none"), *(("int8", recipe) for recipe in SPARSE)]
)
async def test_records_of_the_pools_own_codec_are_stored_as_they_came(llama, kv_codec, recipe):
    """The same numbers as decoding them into an exact pool, until a page closes and is coded; and summaries of them."""
    pack = replace(SPARSE.get(recipe, PackSpec()), codec=kv_codec)
    _, decoded, _ = await logits_of(llama, pack, 8)
    _, stored, _ = await logits_of(llama, pack, 8, kv_codec=kv_codec)
    assert torch.equal(stored, decoded)


@pytest.mark.parametrize("recipe", [*SPARSE, "h2o"])
async def test_open_pages_go_back_with_the_request(llama, recipe):
    """H2O overwrites tokens of pages that are coded already."""
    pack = SPARSE.get(recipe, PackSpec("h2o", budget_tokens=48, window=8, params=(("evict", 1.0),)))
    async with real_pair(llama, num_tokens=1024, kv_codec="int8") as pair:
        pool = pair.decode._memory.pool
        assert isinstance(pool, CodedPool)
        await answer(pair.decode, greedy(PROMPT, 40, pack=pack))
        assert torch.cat(pair.decode_logits).isfinite().all()
        assert pool.num_open_pages == 0


async def test_the_same_memory_holds_more(llama):
    async with real_pair(llama, num_tokens=4096) as exact, real_pair(llama, num_tokens=4096, kv_codec="int8") as coded:
        assert coded.decode._memory.pool.head_page_bytes < 0.4 * exact.decode._memory.pool.head_page_bytes
        assert coded.decode.load().num_total_pages > 1.5 * exact.decode.load().num_total_pages
        assert coded.decode._memory.pool.memory_bytes <= exact.decode._memory.pool.memory_bytes


def test_a_codec_that_cannot_be_is_refused_at_start(llama):
    with pytest.raises(ConfigError, match=r"decode.kv_codec: unknown codec 'int3'; choose one of native, .*int8"):
        packed_pool(llama.spec, "cpu", 16, DecodeConfig(kv_codec="int3"))
    odd = fake_spec()
    odd = type(odd)(**{name: getattr(odd, name) for name in odd.__slots__} | {"head_dim": 96})
    with pytest.raises(ConfigError, match=r"decode.kv_codec: .*96"):
        packed_pool(odd, "cpu", 16, DecodeConfig(kv_codec="turboquant4"))
