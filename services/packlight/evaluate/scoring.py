"""How an answer is scored against its references. Knows strings and token ids, no tasks and no models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def all_match(answer: str, references: Sequence[str]) -> float:
    """The share of `references` that `answer` contains, ignoring case: RULER's string match (arXiv 2404.06654)."""
    assert references, "every sample has a reference"
    said = answer.casefold()
    return sum(reference.casefold() in said for reference in references) / len(references)


def leading_match(answer_ids: Sequence[int], reference_ids: Sequence[int]) -> float:
    """The share of `reference_ids` that `answer_ids` begins with, up to the first difference; 1 is exact.

    Tells a value cut short, whose later digits were not kept, from one that was never found."""
    assert reference_ids, "every reference has a token"
    pairs = zip(answer_ids, reference_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(reference_ids)
