"""Needle in a haystack: magic values stated somewhere in a long text, then asked for (RULER, arXiv 2404.06654).

Knows RULER's eight `niah` variants as one parametrised task, in its published wording. The needle asked for stands at
the chosen depth when there is just one; all others stand at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from types import MappingProxyType
from typing import Literal, NamedTuple

from packlight.evaluate.tasks.base import Draft, Drafter, user
from packlight.evaluate.tasks.haystack import hide, sentences
from packlight.evaluate.tasks.words import Draw, distinct, draw_key, draw_number, draw_uuid

_DRAWS: Mapping[str, Draw] = MappingProxyType({"word": draw_key, "number": draw_number, "uuid": draw_uuid})


class Fact(NamedTuple):
    """What one needle states."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Needles:
    """`num_keys` keys with `num_values` values each are hidden, and the first `num_queries` keys are asked for.

    The haystack `needles` consists of further needles, each with its own key and value."""

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    max_new_tokens: int = 128

    @property
    def has_depth(self) -> bool:
        return self.num_queries * self.num_values == 1

    def drafter(self, length: int, depth: float, rng: Random) -> Drafter:
        seed = rng.getrandbits(64)
        facts = self._hidden_facts(seed)
        needles = [(rng.random(), needle(self.value, fact)) for fact in facts]
        if self.has_depth:
            needles[0] = (depth, needles[0][1])
        asked = facts[: self.num_queries * self.num_values]

        def draft(num_units: int) -> Draft:
            text = hide(needles, self._haystack(num_units, seed))
            return Draft(
                (user(f"{introduce(self.value, len(asked))}\n{text}\n{ask(self.value, asked)}"),),
                begin_answer(self.value, asked),
                tuple(fact.value for fact in asked),
            )

        return draft

    def _hidden_facts(self, seed: int) -> list[Fact]:
        """Grouped by key, the keys asked for first."""
        facts = list(islice(self._facts(seed), self.num_keys * self.num_values))
        return [Fact(facts[i - i % self.num_values].key, fact.value) for i, fact in enumerate(facts)]

    def _haystack(self, num_sentences: int, seed: int) -> Sequence[str]:
        if self.haystack != "needles":
            return sentences(self.haystack, num_sentences, seed)
        # The hidden facts come from the front of the same stream, so nothing in the haystack contradicts them.
        first = self.num_keys * self.num_values
        return [needle(self.value, fact) for fact in islice(self._facts(seed), first, first + num_sentences)]

    def _facts(self, seed: int) -> Iterator[Fact]:
        """Endless facts; no key and no value occurs twice."""
        keys, values = Random(f"keys/{seed}"), Random(f"values/{seed}")
        return map(Fact, distinct(_DRAWS[self.key], keys), distinct(_DRAWS[self.value], values))


def needle(kind: str, fact: Fact) -> str:
    return f"One of the special magic {kind}s for {fact.key} is: {fact.value}."


def introduce(kind: str, num_answers: int) -> str:
    """The words before the haystack."""
    start, told = f"A special magic {kind} is", kind
    if num_answers > 1:
        start, told = f"Some special magic {kind}s are", f"{kind}s"
    return (
        f"{start} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {told} afterwards."
    )


def ask(kind: str, asked: Sequence[Fact]) -> str:
    """The question after the haystack."""
    verb, what = ("What is", kind) if len(asked) == 1 else ("What are all", f"{kind}s")
    return f"{verb} the special magic {what} for {_listed(asked)} mentioned in the provided text?"


def begin_answer(kind: str, asked: Sequence[Fact]) -> str:
    what, verb = (kind, "is") if len(asked) == 1 else (f"{kind}s", "are")
    return f"The special magic {what} for {_listed(asked)} mentioned in the provided text {verb}"


def _listed(asked: Sequence[Fact]) -> str:
    """The keys asked for, in words: `a`, or `a, b, and c`."""
    keys = list(dict.fromkeys(fact.key for fact in asked))
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
