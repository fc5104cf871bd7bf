"""StreamingLLM (arXiv 2309.17453, section 3.2): the first few tokens and the latest ones."""

from __future__ import annotations


def kept(num_tokens: int, budget: int, sinks: int) -> list[int]:
    """Ascending; the same for every head."""
    return [*range(sinks), *range(num_tokens - (budget - sinks), num_tokens)]
