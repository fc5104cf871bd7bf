"""Real processes: one model in two of them, over Gloo, says what it says in one.

Tiny random models in float32. A model is opened once per family: this process is rank 0, one follower is rank 1.
"""

import asyncio
from dataclasses import replace

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

NUM_TOKENS = 20
SNAPKV = PackSpec("snapkv", budget_tokens=48, window=8, kernel=7)
FAMILIES = ("llama", "gemma3", "qwen3-moe")
WAYS = ((2, 1), (1, 2), (2, 2))


def settings_for(folder, *more):
    return build_config(
        {},
        [
            f"model.path={folder}",
            "model.dtype=float32",
            *(f"{role}.attention=sdpa" for role in Role),
            *(f"{role}.kv_memory_bytes=8388608" for role in Role),
            "prefill.chunk_tokens=64",
            *more,
        ],
    )


def prompt_of(num_tokens, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_tokens,), generator=drawn).tolist()


class Sides:
    """One model: as plain transformers, in this process, and in two."""

    def __init__(self, folder, family, *more):
        self.plain = eager_model(family)
        write_model_folder(folder, self.plain)
        self.config = settings_for(folder, *more)
        opened = open_model(self.config.model, on_progress=print)
        self.spec = opened.spec
        model = build_model(opened, self.config.model, Role.PREFILL, on_progress=print)
        self.engines = {1: LocalEngine(model, self.config), 2: ParallelEngine(Crew(opened, self.config, 2, 1, print))}

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

    async def answers(self, ways, prompts, pack):
        """All at once, then the first again, whose prefix is cached by then."""
        async with self.pair(*ways) as decode:
            requests = [request_for(ids, pack, f"r{number}") for number, ids in enumerate(prompts)]
            found = await asyncio.gather(*(answer(decode, request) for request in requests))
            assert await answer(decode, replace(requests[0], request_id="again")) == found[0]
        return found


def request_for(ids, pack=None, name="r"):
    # transformers' min_new_tokens bans the ends, so ours does too.
    stop = {"eos_token_ids": (2,), "ignore_eos": False, "min_tokens": NUM_TOKENS}
    return greedy(ids, NUM_TOKENS, pack=pack, request_id=name, stop=stop)


@pytest.fixture(scope="module", params=FAMILIES)
def sides(request, tmp_path_factory):
    found = Sides(tmp_path_factory.mktemp("model") / request.param, request.param)
    yield found
    found.engines[2].close()


@pytest.fixture
def sides_of_dummies(tmp_path):
    more = ("model.weights=dummy", f"model.cache_dir={tmp_path}", "prefill.attention=auto", "decode.attention=auto")
    found = Sides(tmp_path / "shape", "qwen3-moe", *more)
    yield found
    found.engines[2].close()


one_family = pytest.mark.parametrize("sides", FAMILIES[:1], indirect=True)
PROMPTS = [prompt_of(length, seed=length) for length in (150, 7, 16, 90)]


@pytest.mark.parametrize("ways", WAYS)
async def test_two_ranks_say_what_transformers_says(sides, ways):
    assert await sides.answers(ways, PROMPTS, None) == [sides.says(ids) for ids in PROMPTS]


@pytest.mark.parametrize("ways", WAYS)
async def test_selected_kv_is_the_same_from_two_ranks_and_to_two(sides, ways):
    assert await sides.answers(ways, PROMPTS, SNAPKV) == await sides.answers((1, 1), PROMPTS, SNAPKV)


@one_family
@pytest.mark.parametrize(
    "pack",
    [
        PackSpec("adakv", budget_tokens=48, window=8, kernel=7),  # heads of two ranks compete
        PackSpec("cake", budget_tokens=48, window=8, kernel=7),  # keys are looked at, and layers wait for each other
        PackSpec("h2o", budget_tokens=48, window=8),  # every query is
        replace(SNAPKV, mass_floor=0.9, codec="int8"),
    ],
    ids=lambda pack: pack.recipe,
)
async def test_methods_that_look_across_heads(sides, pack):
    expected = await sides.answers((1, 1), PROMPTS, pack)
    for ways in WAYS:
        assert await sides.answers(ways, PROMPTS, pack) == expected


@pytest.mark.parametrize(
    ("sides", "pack"),
    [
        ("llama", PackSpec("quest", budget_tokens=48)),
        ("llama", PackSpec("rocketkv", budget_tokens=48, window=8)),
        ("llama", PackSpec("freekv", budget_tokens=48)),  # remembers the last query of each row
        ("gemma3", PackSpec("freekv", budget_tokens=32, params=(("cosine", -1.0),), codec="int8")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.recipe,
    indirect=["sides"],
)
async def test_pages_are_chosen_where_they_are(sides, pack):
    """Each rank summarises, rates and chooses the pages of its own heads."""
    expected = await sides.answers((1, 1), PROMPTS, pack)
    assert expected != await sides.answers((1, 1), PROMPTS, replace(pack, budget_tokens=4096)), "nothing was chosen"
    for ways in WAYS:
        assert await sides.answers(ways, PROMPTS, pack) == expected


@one_family
async def test_rows_that_are_read_in_several_ways_share_a_batch(sides):
    packs = [PackSpec("quest", budget_tokens=48), None, PackSpec("freekv", budget_tokens=32), SNAPKV]
    async with sides.pair(2, 1) as one, sides.pair(1, 2) as two:
        for decode in one, two:
            requests = [request_for(PROMPTS[0], pack, f"r{number}") for number, pack in enumerate(packs)]
            alone = [
                await answer(decode, replace(request, request_id=f"{request.request_id}a")) for request in requests
            ]
            assert await asyncio.gather(*(answer(decode, request) for request in requests)) == alone


@one_family
async def test_what_a_divided_pool_cannot_do_is_refused(sides):
    evicts = PackSpec("h2o", budget_tokens=48, window=8, params=(("evict", 1.0),))
    async with sides.pair(2, 1) as decode:
        assert len(await answer(decode, request_for(PROMPTS[0], evicts))) == NUM_TOKENS
    async with sides.pair(1, 2) as decode:
        with pytest.raises(InvalidRequest, match=r"evicts while it decodes.* decode.tensor_parallel=2"):
            await answer(decode, request_for(PROMPTS[0], evicts))


async def test_a_model_of_drawn_weights_is_the_same_in_two_ranks(sides_of_dummies):
    for pack in None, SNAPKV:
        expected = await sides_of_dummies.answers((1, 1), PROMPTS, pack)
        assert await sides_of_dummies.answers((2, 2), PROMPTS, pack) == expected


@one_family
async def test_the_fleet_need_not_know(sides):
    """Wire identity and capacity in tokens are those of one process."""
    alone, divided = (engine.prefill_runner(sides.config.prefill) for engine in sides.engines.values())
    assert divided.model.spec == alone.model.spec == sides.spec
    assert divided.pool.num_blocks == alone.pool.num_blocks
    assert divided.pool.num_kv_heads == alone.pool.num_kv_heads


@one_family
def test_a_hook_that_raises_fails_its_step_and_no_other(sides):
    runner = sides.engines[2].prefill_runner(sides.config.prefill)
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
