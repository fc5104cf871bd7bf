"""Two questions about one document, the second about something that the first had no use for.

A selection made for question 1 keeps what question 1 asks about. Reused for question 2 it lacks the other fact; made
anew from the exact KV it has it (the multi-turn setting of RocketKV-MT, arXiv 2502.14051, and SCBench).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from packlight.evaluate.tasks.base import CountTokens, Draft, Sample, assistant, check_depth, fit, to_sample, user
from packlight.evaluate.tasks.haystack import hide, sentences
from packlight.evaluate.tasks.needles import Fact, ask, begin_answer, introduce, needle
from packlight.evaluate.tasks.words import distinct, draw_key, draw_number

NAME = "two_turn"
_KIND = "number"
_MAX_NEW_TOKENS = 32


def make_two_turn(length: int, depth: float, seed: int, count_tokens: CountTokens) -> tuple[Sample, Sample]:
    """The conversation up to the first and up to the second question; the second holds the first with its answer.

    `depth` (0..1) is where the first fact stands; the second stands half the document away. The second prompt has at
    most `length` tokens. Raises ConfigError as `make_sample` does."""
    rng = Random(f"{NAME}/{length}/{depth}/{seed}")
    conversation = _conversation((check_depth(depth), (depth + 0.5) % 1), rng)
    num_units = fit(NAME, lambda num_units: conversation(num_units)[1], length, count_tokens)
    first, second = conversation(num_units)
    return (
        to_sample(NAME, first, length, depth, _MAX_NEW_TOKENS, count_tokens),
        to_sample(NAME, second, length, depth, _MAX_NEW_TOKENS, count_tokens),
    )


def _conversation(depths: tuple[float, float], rng: Random) -> Callable[[int], tuple[Draft, Draft]]:
    """Both turns with a document of that many sentences."""
    keys, values = distinct(draw_key, rng), distinct(draw_number, rng)
    one, two = Fact(next(keys), next(values)), Fact(next(keys), next(values))
    needles = [(depth, needle(_KIND, fact)) for depth, fact in zip(depths, (one, two), strict=True)]
    seed = rng.getrandbits(64)

    def draft(num_units: int) -> tuple[Draft, Draft]:
        text = hide(needles, sentences("essay", num_units, seed))
        first = Draft(
            (user(f"{introduce(_KIND, 2)}\n{text}\n{ask(_KIND, [one])}"),), begin_answer(_KIND, [one]), (one.value,)
        )
        answered = assistant(f"{first.answer_prefix} {one.value}.")
        messages = (*first.messages, answered, user(ask(_KIND, [two])))
        return first, Draft(messages, begin_answer(_KIND, [two]), (two.value,))

    return draft
