"""What an evaluation will run: which prompts, and which variants of each.

Knows flags as plain values, the recipe table and the model's description. Runs nothing, and imports without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.compress.options import check_model
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import ModelSpec
from packlight.evaluate.prompts import Job
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.variants import Variant

# Those that are about turns, the method that most others build on, and what all are held against.
TWO_TURN_RECIPES = frozenset({"none", "snapkv", "rocketkv_mt"})
# Chat templates wrap a conversation in tokens of their own (SmolLM2: 40 with its system prompt).
TEMPLATE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """`num_forced_tokens` is the longest continuation that is compared; `max_new_tokens` the longest answer, where the
    task itself does not ask for less."""

    jobs: tuple[Job, ...]
    variants: tuple[Variant, ...]
    num_forced_tokens: int = 32
    max_new_tokens: int = 32

    @property
    def num_steps(self) -> int:
        """Variants to run, over all prompts; the second of two turns has each twice."""
        return sum(len(self.variants_of(job)) * (2 if job.task == TWO_TURN else 1) for job in self.jobs)

    def variants_of(self, job: Job) -> list[Variant]:
        if job.task != TWO_TURN:
            return list(self.variants)
        return [each for each in self.variants if each.spec.recipe in TWO_TURN_RECIPES and each.codec == "native"]


def check_lengths(lengths: Sequence[int], model: ModelSpec, num_new_tokens: int) -> None:
    """Raises ConfigError for prompts that the model has no room for, chat template and answer included."""
    room = model.max_context - num_new_tokens - TEMPLATE_TOKENS
    for length in lengths:
        if not 1 <= length <= room:
            raise ConfigError(
                f"--lengths: got {length}, must be from 1 to {room}: the model's window of {model.max_context} less "
                f"{num_new_tokens} for the answer and {TEMPLATE_TOKENS} for the chat template"
            )


def split_by_fit(variants: Sequence[Variant], model: ModelSpec) -> tuple[list[Variant], list[str]]:
    """Those that the model can have, and why it cannot have the others."""
    fitting, refused = [], []
    for variant in variants:
        try:
            check_model(variant.spec, model)
        except InvalidRequest as error:
            refused.append(error.message)
        else:
            fitting.append(variant)
    return fitting, list(dict.fromkeys(refused))
