"""How ragged lengths become pages: arithmetic that both ends of a shipment must agree on.

Knows lengths and page sizes. Knows no tensors, no pool and no recipe; imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterable


def pages_of(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens of one KV head; the last one may be part empty."""
    return -(-num_tokens // page_size)


def total_pages(lengths: Iterable[int], page_size: int) -> int:
    """Head pages of all heads together. Heads never share a page."""
    return sum(pages_of(length, page_size) for length in lengths)
