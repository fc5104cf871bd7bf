"""Text to hide needles in, as endless sentences, and the hiding.

Knows the three haystacks of RULER (arXiv 2404.06654): noise, essays and needles. The first `n` sentences of a longer
haystack are the shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from operator import itemgetter
from typing import Literal

from packlight.evaluate.tasks.essays import essay_sentences

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise_sentences() -> Iterator[str]:
    """RULER's noise: five sentences, again and again."""
    return cycle(_NOISE)


def sentences(kind: Literal["noise", "essay"], num_sentences: int, seed: int) -> list[str]:
    """The first sentences of the haystack called `kind`. Noise is the same for every seed."""
    return list(islice(noise_sentences() if kind == "noise" else essay_sentences(seed), num_sentences))


def hide(needles: Sequence[tuple[float, str]], haystack: Sequence[str]) -> str:
    """The haystack with each (depth, needle) put where `depth` of its sentences lie before it, as one text.

    Needles of equal depth keep their order."""
    text = list(haystack)
    # From the last to the first, so that an insertion does not move the places still to come.
    for depth, needle in sorted(needles, key=itemgetter(0))[::-1]:
        text.insert(round(depth * len(haystack)), needle)
    return " ".join(text)
