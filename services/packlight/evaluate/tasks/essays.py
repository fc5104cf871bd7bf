"""Plain prose without end: the "essay" haystack, for which RULER takes a corpus that may not be shipped.

Sentences come from patterns filled at random, a few to a paragraph, all about the paragraph's subject. They mean
little; what matters is that they read like text, hardly ever repeat, and hold nothing that looks like an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from random import Random

from packlight.evaluate.tasks.essay_grammar import COMMON, PATTERNS, SUBJECTS

_SENTENCES_PER_PARAGRAPH = (4, 9)
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def essay_sentences(seed: int) -> Iterator[str]:
    """Endless sentences. The same seed gives the same ones."""
    rng = Random(seed)
    while True:
        words = {**COMMON, **rng.choice(SUBJECTS)}
        for pattern in rng.sample(PATTERNS, rng.randint(*_SENTENCES_PER_PARAGRAPH)):
            yield _sentence(pattern, words, rng)


def _sentence(pattern: str, words: Mapping[str, tuple[str, ...]], rng: Random) -> str:
    """The pattern, filled: no word twice in the same kind of slot."""
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        word = rng.choice([word for word in words[slot[1]] if word not in used])
        used.add(word)
        return word

    text = _ARTICLE.sub(r"\1n ", _SLOT.sub(fill, pattern))
    return text[0].upper() + text[1:]
