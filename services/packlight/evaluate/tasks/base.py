"""What a sample is, and how its haystack is cut to a length in tokens.

Knows messages, references and token counting. Does not know what any task asks, and has no tokenizer: counting is a
function that the caller brings, so lengths hold for the model under test.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from packlight.core.errors import ConfigError

# Tokens of a text. A caller who wants the chat template's own tokens inside the length adds them here.
CountTokens = Callable[[str], int]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt of some size. `answer_prefix` begins the assistant's turn: a model that would chat goes straight on to
    the answer. `references` are the strings that a perfect answer contains."""

    messages: tuple[Message, ...]
    answer_prefix: str
    references: tuple[str, ...]

    def num_tokens(self, count_tokens: CountTokens) -> int:
        """Tokens of all contents and the answer prefix, each counted by itself."""
        return sum(count_tokens(message["content"]) for message in self.messages) + count_tokens(self.answer_prefix)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its perfect answer. `length` is the size asked for, `num_tokens` the size it has (never more).

    `depth` (0..1) is where in the haystack the answer stands, None for tasks whose answer stands in many places."""

    task: str
    messages: tuple[Message, ...]
    answer_prefix: str
    references: tuple[str, ...]
    length: int
    num_tokens: int
    depth: float | None
    max_new_tokens: int


# The prompt with a haystack of that many units. More units never mean fewer tokens, but for a token or two.
Drafter = Callable[[int], Draft]


class Task(Protocol):
    """A way to make prompts. Implementations are frozen values: everything random comes from the given generator."""

    @property
    def has_depth(self) -> bool:
        """Whether the answer stands in one place that the caller may choose."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Tokens that are enough for any right answer."""
        ...

    def drafter(self, length: int, depth: float, rng: Random) -> Drafter:
        """Draws all that does not depend on the haystack's size. Deterministic, and so is the drafter it returns."""
        ...


def make_sample(name: str, task: Task, length: int, depth: float, seed: int, count_tokens: CountTokens) -> Sample:
    """The sample of `task` with the largest haystack whose prompt has at most `length` tokens.

    A pure function of its arguments; samples that differ in any of the first five share nothing random.
    Raises ConfigError for a depth outside 0..1 and for a length in which not even the empty task fits."""
    placed = check_depth(depth) if task.has_depth else None
    drafter = task.drafter(length, depth, Random(f"{name}/{length}/{placed}/{seed}"))
    num_units = fit(name, drafter, length, count_tokens)
    return to_sample(name, drafter(num_units), length, placed, task.max_new_tokens, count_tokens)


def to_sample(
    name: str, draft: Draft, length: int, depth: float | None, max_new_tokens: int, count_tokens: CountTokens
) -> Sample:
    return Sample(
        task=name,
        messages=draft.messages,
        answer_prefix=draft.answer_prefix,
        references=draft.references,
        length=length,
        num_tokens=draft.num_tokens(count_tokens),
        depth=depth,
        max_new_tokens=max_new_tokens,
    )


def fit(name: str, drafter: Drafter, length: int, count_tokens: CountTokens) -> int:
    """The most haystack units with at most `length` tokens, by binary search. Raises ConfigError when none fit."""

    def size(num_units: int) -> int:
        return drafter(num_units).num_tokens(count_tokens)

    if (least := size(0)) > length:
        raise ConfigError(f"task {name} does not fit into {length} tokens: it needs at least {least}; ask for more")
    above = 1
    while size(above) <= length:
        above *= 2
    # The search only ever settles on a size that it has measured to fit, even where counts are not quite monotonic.
    return bisect_right(range(above), length, lo=above // 2 + 1, key=size) - 1


def check_depth(depth: float) -> float:
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth {depth} is outside 0..1: 0 puts the needle first, 1 last")
    return depth


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
