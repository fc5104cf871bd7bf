"""Common words: which words does a long list hold most often (RULER `cwe`, arXiv 2404.06654).

The answer is spread over the whole prompt: dropping most of the KV must hurt here, and a method for which it does not
has been measured wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from packlight.evaluate.tasks.base import Draft, Drafter, assistant, user
from packlight.evaluate.tasks.words import ADJECTIVES, NOUNS, distinct

_SHORT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Counts:
    """How often common and other words occur in the list, and in the shorter list of the worked example."""

    common: int
    other: int
    example_common: int
    example_other: int
    num_example_words: int


_SHORT = Counts(common=6, other=1, example_common=3, example_other=1, num_example_words=20)
_LONG = Counts(common=30, other=3, example_common=10, example_other=3, num_example_words=40)


@dataclass(frozen=True, slots=True)
class CommonWords:
    """`num_common` words stand out. A worked example with other words comes first, as an earlier turn."""

    num_common: int = 10
    max_new_tokens: int = 120

    @property
    def has_depth(self) -> bool:
        return False

    def drafter(self, length: int, depth: float, rng: Random) -> Drafter:
        counts = _SHORT if length < _SHORT_TOKENS else _LONG
        words = rng.sample(ADJECTIVES + NOUNS, len(ADJECTIVES + NOUNS))
        num_held = self.num_common + counts.num_example_words
        common, example, others = words[: self.num_common], words[self.num_common : num_held], words[num_held:]
        turns = self._example(example, counts, rng)
        seed = rng.getrandbits(64)

        def draft(num_units: int) -> Draft:
            listed = common * counts.common + _others(others, num_units, seed) * counts.other
            question = user(self._question(listed, Random(seed)))
            return Draft((*turns, question), self._answer_prefix(), tuple(common))

        return draft

    def _example(self, words: list[str], counts: Counts, rng: Random) -> tuple[dict[str, str], dict[str, str]]:
        common, others = words[: self.num_common], words[self.num_common :]
        listed = common * counts.example_common + others * counts.example_other
        answer = f"{self._answer_prefix()} {_numbered(common)}"
        return user(self._question(listed, rng)), assistant(answer)

    def _question(self, words: Sequence[str], rng: Random) -> str:
        """The words in random order, and what is asked of them."""
        shuffled = rng.sample(words, len(words))
        return (
            "Below is a numbered list of words. Some of them appear more often than others.\n"
            f"{_numbered(shuffled)}\n"
            f"Question: What are the {self.num_common} most common words in the list above?"
        )

    def _answer_prefix(self) -> str:
        return f"The {self.num_common} most common words in the list are:"


def _others(words: Sequence[str], num_words: int, seed: int) -> list[str]:
    """That many different words: single ones, and pairs of them when they run out."""

    def pair(rng: Random) -> str:
        return "-".join(rng.sample(words, 2))

    num_pairs = max(0, num_words - len(words))
    return [*words[:num_words], *islice(distinct(pair, Random(seed)), num_pairs)]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
