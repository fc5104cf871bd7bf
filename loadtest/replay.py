"""Recorded traces, and prompts that stand in for theirs.

Knows the JSONL that the Mooncake project published its traces in, one request a line: `timestamp` (ms since the start),
`input_length`, `output_length` (tokens) and `hash_ids`, one for each block of 512 input tokens. The texts were not
published; equal ids mean equal blocks behind equal blocks. So each id stands for a text here, made from it alone: equal
ids become equal text, and requests share exactly the prefixes that they shared when they were recorded.

Lengths are multiplied by one factor for the whole trace, blocks included, or prefixes would no longer fit each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as parsed

from packlight.bench.serve.answers import Count, Seconds
from packlight.bench.serve.prompts import Prompts, Question, cut_to
from packlight.core.errors import ConfigError

BLOCK_TOKENS = 512
_SYSTEM = "You continue stories."


@parsed(frozen=True, slots=True, config=ConfigDict(extra="ignore", allow_inf_nan=False))
class Recorded:
    """One line. Other fields, which some traces have, are ignored."""

    timestamp: Seconds
    input_length: Count
    output_length: Count
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A request in the model's own measure: when it is due, and lengths in tokens."""

    due_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scaled:
    """`num_clipped`: prompts that were cut because `length_scale` leaves them longer than the model reads."""

    requests: tuple[Replayed, ...]
    length_scale: float
    num_clipped: int

    @property
    def block_tokens(self) -> int:
        return max(1, round(BLOCK_TOKENS * self.length_scale))


def read_trace(path: Path) -> list[Recorded]:
    """By ascending time. Raises ConfigError naming file, line and field."""
    parser = TypeAdapter(Recorded)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    requests = []
    for number, line in enumerate(lines, 1):
        try:
            requests += [parser.validate_json(line)] if line.strip() else []
        except ValidationError as error:
            raise ConfigError(f"trace {path}, line {number}: {_fault(error)}") from None
    if not requests:
        raise ConfigError(f"trace {path}: has no requests")
    return sorted(requests, key=lambda request: request.timestamp)


def scale(
    trace: Sequence[Recorded], *, duration_s: float, speed: float, max_context: int, length_scale: float | None
) -> Scaled:
    """The requests of the first `duration_s` seconds of the replay. The first is due at 0."""
    longest = max(request.input_length + request.output_length for request in trace)
    factor = min(1.0, max_context / longest) if length_scale is None else length_scale
    began = trace[0].timestamp
    due = [(request, (request.timestamp - began) / 1000 / speed) for request in trace]
    made = [_scaled(request, due_s, factor, max_context) for request, due_s in due if due_s < duration_s]
    return Scaled(tuple(request for request, _ in made), factor, sum(is_clipped for _, is_clipped in made))


def _scaled(request: Recorded, due_s: float, factor: float, max_context: int) -> tuple[Replayed, bool]:
    output_tokens = min(max(1, round(request.output_length * factor)), max_context // 2)
    wanted, room = max(1, round(request.input_length * factor)), max_context - output_tokens
    return Replayed(due_s, min(wanted, room), output_tokens, request.hash_ids), wanted > room


class BlockTexts:
    """The texts that stand for hash ids. One for a run: it remembers those it has made."""

    def __init__(self, prompts: Prompts, block_tokens: int, seed: str) -> None:
        self.system = _SYSTEM
        self._prompts, self._block_tokens, self._seed = prompts, block_tokens, seed
        self._texts: dict[int, str] = {}
        self.least_tokens = prompts.count(_SYSTEM, Question(""))

    def question(self, request: Replayed) -> Question:
        """A prompt of exactly the request's tokens, the chat template's included; what the template needs at least is
        the shortest there is. Whole blocks stand first, as many as fit, and the next one is cut to what is left."""
        wanted = max(request.input_tokens, self.least_tokens)
        whole = [self.text(block) for block in request.hash_ids[: self._num_whole(wanted, len(request.hash_ids))]]
        while self._count(whole) > wanted:
            whole.pop()
        last = request.hash_ids[len(whole)] if len(whole) < len(request.hash_ids) else None

        def write(sentences: Sequence[str]) -> Question:
            """What only fills up is glued to what is there: a space may be a token more."""
            rest = " ".join(sentences)
            return Question(" ".join([*whole, rest]) if rest[:1].isalpha() else " ".join(whole) + rest)

        return cut_to(
            wanted,
            write,
            lambda question: self._prompts.count(_SYSTEM, question),
            self._seed_of(last),
            max_words=wanted - self._count(whole),
        )

    def text(self, block: int) -> str:
        """`block_tokens` tokens when a space comes before it, as it does inside a prompt."""
        if block not in self._texts:
            self._texts[block] = cut_to(
                self._block_tokens,
                lambda sentences: Question(" ".join(sentences)),
                lambda question: self._prompts.count_text(f" {question.content}"),
                self._seed_of(block),
            ).content
        return self._texts[block]

    def _num_whole(self, num_tokens: int, num_blocks: int) -> int:
        """The last block of a prompt is partial as a rule, and the template takes its part of the tokens."""
        return min((num_tokens - self.least_tokens) // self._block_tokens, num_blocks - 1 if num_blocks else 0)

    def _count(self, texts: Sequence[str]) -> int:
        return self._prompts.count(_SYSTEM, Question(" ".join(texts)))

    def _seed_of(self, block: int | None) -> str:
        return f"{self._seed}/block {block}"


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the line"
    return f"{where}: {first['msg']}"
