"""The prompts of an evaluation: which are made, in which order, and as which tokens.

Knows tasks and the tokenizer. Knows no recipe and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from packlight.evaluate.results import TEACHER_FORCED
from packlight.evaluate.tasks import Sample, find_task, make_sample, make_two_turn
from packlight.evaluate.tasks.base import CountTokens, Draft, fit, to_sample, user
from packlight.evaluate.tasks.haystack import sentences
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to make: of a task, of `TWO_TURN`, or of `TEACHER_FORCED`, whose prompts have no right answer."""

    task: str
    length: int
    depth: float
    seed: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """`token_ids` end with the beginning of the answer. `turn_ends` are the anchors: where each turn's prompt ends."""

    job: Job
    sample: Sample
    token_ids: tuple[int, ...]
    turn_ends: tuple[int, ...]


def make_jobs(
    tasks: Sequence[str], lengths: Sequence[int], num_depths: int, num_samples: int, seed: int
) -> tuple[Job, ...]:
    """A grid of lengths and depths for each task and seed; tasks whose answer stands in many places have no depths.

    Ordered so that an interrupted run has seen a little of everything. Raises ConfigError for an unknown task."""
    middles = tuple((2 * index + 1) / (2 * num_depths) for index in range(num_depths))
    return tuple(
        Job(task, length, depth, seed + index)
        for index in range(num_samples)
        for length in sorted(lengths)
        for task in tasks
        for depth in (middles if _has_depth(task) else (0.5,))
    )


def make_prompt(job: Job, tokenizer: Tokenizer) -> Prompt:
    """A pure function of its arguments. Raises ConfigError if the length is too small for the task."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    if job.task == TWO_TURN:
        first, second = make_two_turn(job.length, job.depth, job.seed, count)
        before, after = _encode(first, tokenizer), _encode(second, tokenizer)
        return Prompt(job, second, after, (num_shared(before, after), len(after)))
    make = make_continued if job.task == TEACHER_FORCED else make_sample
    sample = make(job.task, job.length, job.depth, job.seed, count)
    token_ids = _encode(sample, tokenizer)
    return Prompt(job, sample, token_ids, (len(token_ids),))


def check_prompts(jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
    """Raises ConfigError, at once instead of in the middle of a run, for a task that does not fit into a length."""
    for job in {(job.task, job.length): job for job in jobs}.values():
        make_prompt(job, tokenizer)


def make_continued(name: str, length: int, depth: float, seed: int, count_tokens: CountTokens) -> Sample:
    """A text to be summed up: no answer is right, but packing should not change what is said."""

    def draft(num_sentences: int) -> Draft:
        text = " ".join(sentences("essay", num_sentences, seed))
        return Draft((user(f"{text}\n\nSum up the text above in a few sentences."),), "The text above is about", ())

    return to_sample(name, draft(fit(name, draft, length, count_tokens)), length, None, 0, count_tokens)


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _has_depth(task: str) -> bool:
    if task in (TWO_TURN, TEACHER_FORCED):
        return task == TWO_TURN
    return find_task(task).has_depth


def _encode(sample: Sample, tokenizer: Tokenizer) -> tuple[int, ...]:
    return (*tokenizer.apply_chat_template(sample.messages), *tokenizer.encode(sample.answer_prefix))
