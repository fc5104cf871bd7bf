"""The evaluation on the real model: methods that differ on paper differ in its figures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from packlight.attention.sdpa import SdpaAttention
from packlight.engine.runner import Runner
from packlight.evaluate.harness import Harness, Limits
from packlight.evaluate.observations import to_points
from packlight.evaluate.plan import Plan
from packlight.evaluate.prompts import Job
from packlight.evaluate.results import TEACHER_FORCED, TWO_TURN_ANEW, TWO_TURN_REUSED, Point
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.variants import NATIVE, Variant, make_variant, parse_recipes
from packlight.kv.pool import KVPool

pytestmark = pytest.mark.slow


def variant(recipe: str, factor: float, codec: str = NATIVE) -> Variant:
    return make_variant(parse_recipes(recipe)[0], codec, factor)


def evaluate(smollm2, model, job: Job, packed: Sequence[Variant]) -> dict[tuple[str, str], Point]:
    runner = Runner(model, KVPool(model.spec, num_blocks=80, page_size=16, dtype=torch.float32), SdpaAttention())
    plan = Plan((job,), tuple(packed), num_forced_tokens=8, max_new_tokens=10)
    harness = Harness(runner, smollm2.tokenizer, plan, Limits(200_000), chunk_tokens=512)
    points = to_points(seen for observations in harness.run() for seen in observations)
    return {(point.recipe, point.task): point for point in points}


def test_what_is_found_and_what_is_lost(smollm2, smollm2_model):
    """A needle in the middle: recency alone cannot have it, and a narrow kernel cuts its value short."""
    packed = [
        variant("none", 1),
        variant("snapkv", 4),
        variant("streaming_llm", 4),
        variant("snapkv:kernel=63", 8),
        variant("snapkv:kernel=5", 8),
    ]
    job = Job("niah_single_1", 1000, 0.5, seed=0)
    seen = evaluate(smollm2, smollm2_model, job, packed)
    scores = {recipe: point.score for (recipe, task), point in seen.items() if task == job.task}
    assert scores == {"none": 1, "snapkv": 1, "streaming_llm": 0, "snapkv:kernel=63": 1, "snapkv:kernel=5": 0}
    kl = {recipe: point.kl_mean for (recipe, task), point in seen.items() if task == TEACHER_FORCED}
    assert kl["none"] < 1e-6
    assert kl["none"] < kl["snapkv"] < kl["snapkv:kernel=63"] < kl["snapkv:kernel=5"] < kl["streaming_llm"]
    shares = {recipe: point.kept_share for (recipe, task), point in seen.items() if task == job.task}
    assert shares["snapkv"] == pytest.approx(1 / 4, abs=16 / 1000)
    assert shares["snapkv:kernel=5"] == pytest.approx(1 / 8, abs=16 / 1000)


def test_a_selection_for_the_first_question_is_no_use_for_the_second(smollm2, smollm2_model):
    """The exact prefix is still there, so the selection made anew finds what the first one let go."""
    packed = [variant("none", 1), variant("snapkv", 4)]
    seen = evaluate(smollm2, smollm2_model, Job(TWO_TURN, 1024, 1 / 6, seed=0), packed)
    scores = {(recipe, task): point.score for (recipe, task), point in seen.items()}
    assert scores == {
        ("none", TWO_TURN_ANEW): 1,
        ("none", TWO_TURN_REUSED): 1,
        ("snapkv", TWO_TURN_ANEW): 1,
        ("snapkv", TWO_TURN_REUSED): 0,
    }
