"""The harness on a tiny random Llama: what it measures is what an independent computation says.

A random model answers nothing right, but packing moves its distributions like any other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from packlight.attention.sdpa import SdpaAttention
from packlight.compress.recipes import RECIPES
from packlight.core.config import DType, ModelConfig
from packlight.core.errors import RequestNeverFits
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.engine.runner import Runner
from packlight.evaluate.harness import Harness, Limits
from packlight.evaluate.observations import Observation, to_points
from packlight.evaluate.plan import Plan
from packlight.evaluate.prompts import Job, make_prompt
from packlight.evaluate.results import TEACHER_FORCED, TWO_TURN_ANEW, TWO_TURN_REUSED
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.variants import NATIVE, RecipeChoice, Variant, make_variant, parse_recipes
from packlight.kv.pool import KVPool
from packlight.models.base import LanguageModel
from packlight.models.opened import OpenedModel, open_model
from tests.support.real_pair import MaskedAttention
from tests.support.tiny_models import TINY_CONFIGS, DenseAttention, write_model_folder

PAGE = 16
NEEDLE = Job("niah_single_1", 600, 0.5, 0)
CONTINUED = Job(TEACHER_FORCED, 200, 0.5, 0)
TURNS = Job(TWO_TURN, 900, 0.3, 0)
EXACT = make_variant(RecipeChoice("none", "none"), NATIVE, 1)


def open_tiny(folder: Path, family: str) -> OpenedModel:
    """Tiny, float32, with room for a thousand tokens. Larger weights than usual give it a sharp attention."""
    torch.manual_seed(0)
    config = TINY_CONFIGS[family]()
    config.max_position_embeddings, config.initializer_range = 2048, 0.3
    write_model_folder(folder, transformers.AutoModelForCausalLM.from_config(config))
    return open_model(ModelConfig(path=str(folder), dtype=DType.FLOAT32), on_progress=print)


def load(opened: OpenedModel) -> LanguageModel:
    return build_model(opened, ModelConfig(dtype=DType.FLOAT32), Role.PREFILL, on_progress=print)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> OpenedModel:
    return open_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def model(opened) -> LanguageModel:
    return load(opened)


def variants(*names: str, factor: float = 4, codec: str = NATIVE) -> tuple[Variant, ...]:
    return tuple(make_variant(choice, codec, factor) for name in names for choice in parse_recipes(name))


def harness(opened, model, plan: Plan, *, chunk_tokens: int = 512, max_pages: int = 100_000, **kwargs) -> Harness:
    pool = KVPool(model.spec, num_blocks=128, page_size=PAGE, dtype=torch.float32)
    runner = Runner(model, pool, SdpaAttention())
    return Harness(runner, opened.tokenizer, plan, Limits(max_pages), chunk_tokens=chunk_tokens, **kwargs)


def run(opened, model, jobs: Sequence[Job], packed: Sequence[Variant], **kwargs) -> list[Observation]:
    plan = Plan(tuple(jobs), tuple(packed), num_forced_tokens=6, max_new_tokens=6)
    return [seen for observations in harness(opened, model, plan, **kwargs).run() for seen in observations]


def compared(observations: Sequence[Observation]) -> dict[str, Observation]:
    return {seen.variant.recipe: seen for seen in observations if seen.task == TEACHER_FORCED}


def timeless(observations: Sequence[Observation]) -> list[Observation]:
    return [replace(seen, footprint=replace(seen.footprint, select_s=0, prefill_s=0)) for seen in observations]


# ── nothing is lost where nothing is left out ────────────────────────────────────────────────────────────────────────


def test_at_factor_1_every_recipe_is_exact(opened, model):
    packed = [make_variant(choice, NATIVE, 1) for choice in parse_recipes("all")]
    observations = run(opened, model, [NEEDLE, CONTINUED], packed)
    assert len(observations) == 3 * len(RECIPES)
    (answer,) = {seen.answer for seen in observations if seen.score is not None}
    assert len(answer) > 1
    for seen in observations:
        assert seen.footprint.num_kept_tokens == seen.footprint.num_prompt_tokens, seen.variant
        assert seen.footprint.num_read_tokens == seen.footprint.num_kept_tokens
        assert seen.footprint.retained_mass == 1.0
        if seen.fidelity is not None:
            assert max(seen.fidelity.kl_nats) < 1e-9
            assert max(seen.fidelity.errors) < 1e-4
            assert all(seen.fidelity.agrees)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3-moe"])
def test_other_families(family, tmp_path):
    """Layers with a sliding window keep that much, whatever is asked for."""
    other = open_tiny(tmp_path, family)
    recipes = ("snapkv", "cake", "rocketkv", "quest:dense_layers=0")
    packed = [*variants(*recipes, factor=1), *variants(*recipes, factor=4)]
    observations = run(other, load(other), [CONTINUED], packed)
    for seen in observations[:4]:
        assert max(seen.fidelity.kl_nats) < 1e-9
        assert seen.footprint.num_read_tokens == seen.footprint.num_exact_read_tokens
    if None in other.spec.sliding_windows:
        assert all(min(seen.fidelity.errors) > 1e-3 for seen in observations[4:])
    else:
        assert all(seen.footprint.num_kept_tokens == 5 for seen in observations)


def test_a_recipe_that_leaves_something_out_is_further_off(opened, model):
    seen = compared(run(opened, model, [CONTINUED], [EXACT, *variants("snapkv", "streaming_llm", "quest", "rocketkv")]))
    for recipe in ("snapkv", "streaming_llm", "quest", "rocketkv"):
        assert max(seen[recipe].fidelity.kl_nats) > 1e-4, recipe
        assert min(seen[recipe].fidelity.errors) > 1e-3, recipe
        assert seen[recipe].footprint.num_read_tokens < seen["none"].footprint.num_read_tokens
    assert seen["snapkv"].footprint.packed_bytes < seen["none"].footprint.packed_bytes / 3
    assert seen["quest"].footprint.packed_bytes == seen["none"].footprint.packed_bytes


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Recorded:
    """Keeps what a sink answers for the rows from `start` on: [L, N, H, D]."""

    def __init__(self, sink, start: int) -> None:
        self._sink, self._start, self.outputs = sink, start, []

    def attend(self, layer: int, q_THD: Tensor, *args, **kwargs) -> Tensor:
        out_THD = self._sink.attend(layer, q_THD, *args, **kwargs)
        self.outputs.append(out_THD[self._start :])
        return out_THD


def forward(model, token_ids: Sequence[int], sink, start: int) -> Tensor:
    tokens = torch.tensor(token_ids)
    return model.forward(tokens, torch.arange(len(tokens)), sink, torch.arange(start, len(tokens))).double()


@pytest.mark.parametrize("recipe", ["snapkv:kernel=63", "snapkv:kernel=5:sinks=0:window=16"])
def test_kl_agreement_and_error_are_those_of_masked_attention(opened, model, recipe):
    """Whole sequences in one pass, no pages: exact, and with every token masked that the paper's method leaves out."""
    (variant,) = variants(recipe)
    (seen,) = run(opened, model, [CONTINUED], [variant])
    prompt = make_prompt(CONTINUED, opened.tokenizer).token_ids
    n, token_ids = len(prompt), list(prompt)
    while len(token_ids) < n + 6:
        logits = forward(model, token_ids, DenseAttention([len(token_ids)]), len(token_ids) - 1)
        token_ids.append(int(logits[0].argmax()))
    assert len(seen.fidelity.kl_nats) == 6, "another seed, should the continuation of this one end early"
    exact = Recorded(DenseAttention([len(token_ids)]), n)
    budget = -(-n // 4)
    packed = Recorded(MaskedAttention(n, replace(variant.spec, budget_tokens=budget, ratio=None)), n)
    log_p, log_q = (forward(model, token_ids, sink, n).log_softmax(-1) for sink in (exact, packed))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(torch.tensor(seen.fidelity.kl_nats).double(), kl, atol=1e-6, rtol=1e-3)
    assert list(seen.fidelity.agrees) == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    difference, whole = (
        torch.stack(outputs).flatten(2).norm(dim=-1)
        for outputs in ([a - b for a, b in zip(packed.outputs, exact.outputs, strict=True)], exact.outputs)
    )
    errors = (difference / whole).mean(0)
    torch.testing.assert_close(torch.tensor(seen.fidelity.errors), errors, atol=1e-4, rtol=1e-3)
    assert seen.footprint.num_kept_tokens == budget


# ── what must not matter ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_run_gives_the_same_results(opened, model):
    packed = [EXACT, *variants("snapkv", "h2o", "quest"), *variants("snapkv", codec="int4")]
    first, second = (run(opened, model, [NEEDLE], packed) for _ in range(2))
    assert timeless(first) == timeless(second)


@pytest.mark.parametrize("different", [{"chunk_tokens": 50}, {"max_pages": 700}])
def test_chunks_and_groups_do_not_matter(opened, model, different):
    """Chunks of 50 split the window; few pages split the batch."""
    packed = [EXACT, *variants("snapkv", "h2o", "cake", "freekv")]
    one, other = (run(opened, model, [NEEDLE], packed, **kwargs) for kwargs in ({}, different))
    for left, right in zip(one, other, strict=True):
        assert (left.variant, left.task, left.answer) == (right.variant, right.task, right.answer)
        assert left.footprint.num_kept_tokens == right.footprint.num_kept_tokens
        if left.fidelity is not None:
            assert left.fidelity.kl_nats == pytest.approx(right.fidelity.kl_nats, abs=1e-6, rel=1e-3)


def test_a_prompt_too_large_for_the_packed_pool_is_refused(opened, model):
    with pytest.raises(RequestNeverFits, match=r"decode\.kv_memory_bytes"):
        run(opened, model, [NEEDLE], [EXACT], max_pages=100)


def test_a_prompt_too_large_for_the_exact_pool_is_refused(opened, model):
    with pytest.raises(RequestNeverFits, match=r"128.*prefill\.kv_memory_bytes"):
        run(opened, model, [Job("niah_single_1", 5000, 0.5, 0)], [EXACT])


# ── two turns ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_turns_after_exact_kv_answer_alike_anew_and_reused(opened, model):
    """With everything kept, feeding the second question token by token is the same as prefilling it."""
    anew, reused = run(opened, model, [TURNS], [EXACT])
    assert (anew.task, reused.task) == (TWO_TURN_ANEW, TWO_TURN_REUSED)
    assert anew.answer == reused.answer
    assert reused.footprint.num_prompt_tokens < anew.footprint.num_prompt_tokens


def test_only_recipes_about_turns_take_part_in_them(opened, model):
    seen = run(opened, model, [TURNS], [EXACT, *variants("snapkv", "rocketkv_mt", "h2o")])
    assert [each.variant.recipe for each in seen] == ["none", "snapkv", "rocketkv_mt"] * 2
    anew, reused = seen[1], seen[4]
    assert anew.footprint.num_kept_tokens == -(-anew.footprint.num_prompt_tokens // 4)
    assert reused.footprint.num_kept_tokens == -(-reused.footprint.num_prompt_tokens // 4)


# ── what is reported ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_time_is_told_apart(opened, model):
    """Of 1 s a tick: selecting takes some, selecting by all queries more, and the prefill counts neither."""
    ticks = iter(range(10**6))
    packed = [EXACT, *variants("snapkv", "h2o")]
    seen = compared(run(opened, model, [CONTINUED], packed, clock=lambda: float(next(ticks))))
    assert seen["h2o"].footprint.select_s > seen["snapkv"].footprint.select_s > 0
    assert len({each.footprint.prefill_s for each in seen.values()}) == 1
    points = to_points(seen.values())
    assert all(point.select_share is not None and 0 < point.select_share < 1 for point in points)


def test_steps_are_counted(opened, model):
    counted: list[tuple[str, int]] = []
    plan = Plan((NEEDLE, TURNS), (EXACT, *variants("snapkv", "h2o")), num_forced_tokens=2, max_new_tokens=2)
    for _ in harness(opened, model, plan, on_step=lambda what, num_done: counted.append((what, num_done))).run():
        pass
    assert sum(num_done for _, num_done in counted) == plan.num_steps == 3 + 2 * 2
    assert {what for what, _ in counted} == {"niah_single_1 600", "two_turn 900"}
