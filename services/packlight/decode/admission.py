"""What a request may need of the decode pool, and whether it can be had. Pure arithmetic on head pages.

Admission reserves the worst case: the recipe's bound for the prompt and every token the answer may get. So a running
request never runs out of pages, nothing is preempted, and two requests can never wait for each other.
"""

from __future__ import annotations

from packlight.compress.budget import max_pages
from packlight.core.errors import RequestNeverFits
from packlight.core.types import GenerateRequest, ModelSpec


def pages_needed(request: GenerateRequest, spec: ModelSpec, page_size: int) -> int:
    """Head pages over all layers and KV heads, at most."""
    return max_pages(request.pack, spec, request.num_prompt_tokens, page_size, num_new_tokens=request.stop.max_tokens)


def check_fits(num_needed: int, num_total: int) -> None:
    """Raise RequestNeverFits if the pool could not hold the request even when empty."""
    if num_needed > num_total:
        raise RequestNeverFits(
            f"the request may need {num_needed} KV head pages, the decode pool has {num_total}: lower max_tokens, "
            "choose a smaller kv.budget, or raise decode.kv_memory_bytes"
        )


class Reservations:
    """Head pages promised to admitted requests. Not thread-safe: one owner calls it."""

    def __init__(self, num_total: int) -> None:
        self.num_total, self.num_reserved = num_total, 0

    @property
    def num_free(self) -> int:
        return self.num_total - self.num_reserved

    def take(self, num_pages: int) -> bool:
        if num_pages > self.num_free:
            return False
        self.num_reserved += num_pages
        return True

    def give_back(self, num_pages: int) -> None:
        self.num_reserved -= num_pages
