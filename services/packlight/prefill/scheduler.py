"""What the next prefill step computes. Pure: progress in, plan out.

Two rules make the result independent of chunking, batching and prefix hits:

- selection looks at the queries of the `window` tokens before the anchor (the end of the prompt), so the last chunk of
  a prompt must hold all of them: it starts at `final_start` at the latest;
- the same bound clips a prefix hit: those queries have to be computed, whatever is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_PAGES = 4
"""Every step reads all weights. Where that alone takes longer than a step may, smaller steps would keep answers waiting
as long and the prompt for ever."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one admitted prompt: `num_done` of `num_tokens` are stored; the last chunk starts at or before
    `final_start`."""

    num_done: int
    num_tokens: int
    final_start: int


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Tokens `start : end` of the `index`-th prompt."""

    index: int
    start: int
    end: int


def final_start(num_tokens: int, anchor: int, window: int) -> int:
    """Where the last chunk must have started: before the window, and before the last token, which gives the logits."""
    return max(0, min(anchor - window, num_tokens - 1))


def usable_hit(num_cached: int, num_tokens: int, anchor: int, window: int, page_size: int) -> int:
    """How many of `num_cached` tokens need no computing, in whole pages."""
    usable = min(num_cached, final_start(num_tokens, anchor, window))
    return usable - usable % page_size


def step_room(chunk_tokens: int, page_size: int, *, tokens_per_s: float, max_s: float | None) -> int:
    """How many tokens a step may have: `chunk_tokens`, and with `max_s` no more than take that long at the speed of
    recent steps. `LEAST_PAGES` at least, which is also what an unknown speed (0) allows: the step measures it."""
    if max_s is None:
        return chunk_tokens
    return min(chunk_tokens, max(LEAST_PAGES * page_size, int(tokens_per_s * max_s)))


def plan_step(prompts: Sequence[Progress], *, chunk_tokens: int, max_prompts: int) -> tuple[ChunkPlan, ...]:
    """First come, first served: fill `chunk_tokens` from the oldest prompts on.

    A last chunk that is larger than `chunk_tokens` (a wide window) runs alone and exceeds it."""
    plan: list[ChunkPlan] = []
    room = chunk_tokens
    for index, prompt in enumerate(prompts):
        if room <= 0 or len(plan) == max_prompts:
            break
        end = _chunk_end(prompt, room, alone=not plan)
        if end > prompt.num_done:
            plan.append(ChunkPlan(index, prompt.num_done, end))
            room -= end - prompt.num_done
    return tuple(plan)


def _chunk_end(prompt: Progress, room: int, *, alone: bool) -> int:
    if prompt.num_tokens - prompt.num_done <= room:
        return prompt.num_tokens
    end = min(prompt.num_done + room, prompt.final_start)
    if end > prompt.num_done or not alone:
        return end
    return prompt.num_tokens
