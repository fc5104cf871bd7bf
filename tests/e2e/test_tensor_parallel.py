"""Real processes: one model in two of them, over Gloo, says what it says in one.

Tiny random models in float32. This process is rank 0 and one follower is rank 1, for all models of this file. What a
family says with so many ranks is asked once, every method beside the others, and each test looks at its part of that.
"""

import asyncio
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from packlight.core.config_tree import build_config
from packlight.core.errors import InternalError, InvalidRequest
from packlight.core.types import PackSpec
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.engine.engine import LocalEngine, ParallelEngine
from packlight.engine.parallel.crew import Crew
from packlight.engine.runner import ChunkWork
from packlight.models.opened import open_model
from tests.support.engine_pair import pair_of_engines
from tests.support.fake_pair import answer
from tests.support.real_pair import greedy
from tests.support.tiny_models import VOCABULARY, eager_model, write_model_folder

pytestmark = pytest.mark.e2e

NUM_TOKENS = 20  # every answer goes on to another page, and gemma3 says something else when it reads few
FAMILIES = ("llama", "gemma3", "qwen3-moe")
WAYS = ((2, 1), (1, 2), (2, 2))
"""Ranks of the prefill worker and of the decode worker."""


def prompt_of(num_tokens, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_tokens,), generator=drawn).tolist()


PROMPTS = [prompt_of(length, seed=length) for length in (150, 90, 7, 16)]
LONG = PROMPTS[:2]
NONE, SNAPKV = PackSpec(), PackSpec("snapkv", budget_tokens=48, window=8, kernel=7)
ACROSS_HEADS = {
    "adakv": PackSpec("adakv", budget_tokens=48, window=8, kernel=7),  # heads of two ranks compete
    "cake": PackSpec(
        "cake", budget_tokens=48, window=8, kernel=7
    ),  # keys are looked at, and layers wait for each other
    "h2o": PackSpec("h2o", budget_tokens=48, window=8),  # every query is
    "int8 with a floor": replace(SNAPKV, mass_floor=0.9, codec="int8"),
}
BY_PAGES = {
    "quest": PackSpec("quest", budget_tokens=48),
    "rocketkv": PackSpec("rocketkv", budget_tokens=48, window=8),
    "freekv": PackSpec("freekv", budget_tokens=48),  # remembers the last query of each row
    "freekv of int8": PackSpec("freekv", budget_tokens=32, params=(("cosine", -1.0),), codec="int8"),
}
CHOOSES_PAGES = [("llama", "quest"), ("llama", "rocketkv"), ("llama", "freekv"), ("gemma3", "freekv of int8")]


def unbounded(pack):
    """The same, but for a budget that leaves nothing to choose."""
    return replace(pack, budget_tokens=4096)


def methods_of(family):
    """What long prompts are packed by, besides `NONE` and `SNAPKV`."""
    by_pages = [BY_PAGES[method] for name, method in CHOOSES_PAGES if name == family]
    across_heads = ACROSS_HEADS.values() if family == "llama" else ()
    return [*across_heads, *by_pages, *map(unbounded, by_pages)]


def settings_for(folder, *more):
    return build_config(
        {},
        [
            f"model.path={folder}",
            "model.dtype=float32",
            *(f"{role}.attention=sdpa" for role in Role),
            *(f"{role}.kv_memory_bytes=8388608" for role in Role),
            "prefill.chunk_tokens=64",
            "decode.max_batch=32",
            *more,
        ],
    )


class Sides:
    """One model: as plain transformers, in this process, and in two."""

    def __init__(self, crew, folder, family, *more):
        self.plain, self._methods = eager_model(family), methods_of(family)
        write_model_folder(folder, self.plain)
        self.config = settings_for(folder, *more)
        opened = open_model(self.config.model, on_progress=print)
        self.spec = opened.spec
        model = build_model(opened, self.config.model, Role.PREFILL, on_progress=print)
        divided = ParallelEngine(crew, crew.load(opened, self.config, print))
        self.engines = {1: LocalEngine(model, self.config), 2: divided}
        self._answers = {}

    def says(self, ids):
        """What transformers generates."""
        with torch.inference_mode():
            out = self.plain.generate(
                torch.tensor([ids]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
            )
        return out[0, len(ids) :].tolist()

    def pair(self, num_prefill, num_decode):
        """A decode worker of so many ranks, with its prefill worker."""
        return pair_of_engines(self.config, self.engines[num_prefill], self.engines[num_decode])

    async def answers(self, ways, pack, prompts=LONG):
        """What is said to `prompts` packed like this, in so many ranks."""
        if ways not in self._answers:
            self._answers[ways] = await self._ask_all(ways)
        return [self._answers[ways][pack, tuple(ids)] for ids in prompts]

    async def _ask_all(self, ways):
        """{(pack, prompt): tokens}. The long prompts come again beside the methods, when their prefixes are cached."""
        async with self.pair(*ways) as decode:
            found = await ask_together(decode, product((NONE, SNAPKV), PROMPTS))
            again = await ask_together(decode, product((NONE, SNAPKV, *self._methods), LONG))
        assert again | found == found | again, "a cached prefix made a difference"
        return found | again


async def ask_together(decode, asked):
    """{(pack, prompt): tokens}, of requests that share batches."""
    asked = [(pack, tuple(ids)) for pack, ids in asked]
    requests = (request_for(ids, pack, f"r{number}") for number, (pack, ids) in enumerate(asked))
    return dict(zip(asked, await asyncio.gather(*(answer(decode, request) for request in requests)), strict=True))


def request_for(ids, pack=NONE, name="r"):
    # transformers' min_new_tokens bans the ends, so ours does too.
    stop = {"eos_token_ids": (2,), "ignore_eos": False, "min_tokens": NUM_TOKENS}
    return greedy(ids, NUM_TOKENS, pack=pack, request_id=name, stop=stop)


@pytest.fixture(scope="module")
def crew():
    """Two processes, for models that come one after the other."""
    found = Crew(build_config({}, []), 2, 1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def sides_of(crew, tmp_path_factory):
    return cache(lambda family: Sides(crew, tmp_path_factory.mktemp("model") / family, family))


@pytest.fixture(params=FAMILIES)
def sides(request, sides_of):
    return sides_of(request.param)


@pytest.fixture
def llama(sides_of):
    return sides_of("llama")


@pytest.fixture
def sides_of_dummies(crew, tmp_path):
    more = ("model.weights=dummy", f"model.cache_dir={tmp_path}", "prefill.attention=auto", "decode.attention=auto")
    return Sides(crew, tmp_path / "shape", "qwen3-moe", *more)


@pytest.mark.parametrize("ways", WAYS)
async def test_two_ranks_say_what_transformers_says(sides, ways):
    assert await sides.answers(ways, NONE, PROMPTS) == [sides.says(ids) for ids in PROMPTS]


@pytest.mark.parametrize("ways", WAYS)
async def test_selected_kv_is_the_same_from_two_ranks_and_to_two(sides, ways):
    assert await sides.answers(ways, SNAPKV, PROMPTS) == await sides.answers((1, 1), SNAPKV, PROMPTS)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("method", ACROSS_HEADS)
async def test_methods_that_look_across_heads(llama, method, ways):
    pack = ACROSS_HEADS[method]
    assert await llama.answers(ways, pack) == await llama.answers((1, 1), pack)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize(("family", "method"), CHOOSES_PAGES)
async def test_pages_are_chosen_where_they_are(sides_of, family, method, ways):
    """Each rank summarises, rates and chooses the pages of its own heads."""
    sides, pack = sides_of(family), BY_PAGES[method]
    expected = await sides.answers((1, 1), pack)
    assert expected != await sides.answers((1, 1), unbounded(pack)), "nothing was chosen"
    assert await sides.answers(ways, pack) == expected


@pytest.mark.parametrize("ways", [(2, 1), (1, 2)])
async def test_rows_that_are_read_in_several_ways_share_a_batch(llama, ways):
    packs = [PackSpec("quest", budget_tokens=48), NONE, PackSpec("freekv", budget_tokens=32), SNAPKV]
    async with llama.pair(*ways) as decode:
        alone = {}
        for pack in packs:
            alone |= await ask_together(decode, [(pack, PROMPTS[0])])
        assert await ask_together(decode, product(packs, PROMPTS[:1])) == alone


async def test_what_a_divided_pool_cannot_do_is_refused(llama):
    evicts = PackSpec("h2o", budget_tokens=48, window=8, params=(("evict", 1.0),))
    async with llama.pair(2, 1) as decode:
        assert len(await answer(decode, request_for(PROMPTS[0], evicts))) == NUM_TOKENS
    async with llama.pair(1, 2) as decode:
        with pytest.raises(InvalidRequest, match=r"evicts while it decodes.* decode.tensor_parallel=2"):
            await answer(decode, request_for(PROMPTS[0], evicts))


async def test_a_model_of_drawn_weights_is_the_same_in_two_ranks(sides_of_dummies):
    for pack in NONE, SNAPKV:
        expected = await sides_of_dummies.answers((1, 1), pack, PROMPTS)
        assert await sides_of_dummies.answers((2, 2), pack, PROMPTS) == expected


async def test_the_fleet_need_not_know(llama):
    """Wire identity and capacity in tokens are those of one process."""
    alone, divided = (engine.prefill_runner(llama.config.prefill) for engine in llama.engines.values())
    assert divided.model.spec == alone.model.spec == llama.spec
    assert divided.pool.num_blocks == alone.pool.num_blocks
    assert divided.pool.num_kv_heads == alone.pool.num_kv_heads


def test_a_hook_that_raises_fails_its_step_and_no_other(llama):
    runner = llama.engines[2].prefill_runner(llama.config.prefill)
    work = ChunkWork(PROMPTS[2], 0, torch.arange(1).numpy(), wants_logits=True)
    expected = runner.prefill([work])
    layers = []

    def break_in_the_second(layer, queries):
        layers.append(layer)
        if layer == 1:
            raise InternalError("no token can be preferred")

    with pytest.raises(InternalError, match="preferred"):
        runner.prefill([work], break_in_the_second)
    assert layers == [0, 1]
    assert torch.equal(runner.prefill([work]), expected)
