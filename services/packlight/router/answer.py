"""The JSON of an answer: as one body, or as the chunks of a stream.

Knows OpenAI's envelopes and their order: per choice an opening chunk, pieces, one closing chunk; then usage. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.core.types import ModelSpec
from packlight.router.choice import Choice, Delta, ShownToken
from packlight.router.dialect import Answered, Dialect, Json
from packlight.router.job import Job
from packlight.router.tools.calls import CallDelta
from packlight.router.usage import usage_counts


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every part of one answer repeats. `created` is in seconds since 1970."""

    answer_id: str
    created: int
    model: str
    fingerprint: str

    def around(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.answer_id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "service_tier": "default",
            "system_fingerprint": self.fingerprint,
        }


def system_fingerprint(model: ModelSpec) -> str:
    """Names weights, tokenizer and dtype: two servers with the same one answer alike."""
    return "fp_" + hashlib.blake2b(model.fingerprint.encode(), digest_size=5).hexdigest()


class StreamedAnswer:
    """The chunks that report one delta after another."""

    def __init__(self, job: Job, dialect: Dialect[Any], envelope: Envelope, choices: Sequence[Choice]) -> None:
        self._job, self._dialect, self._envelope, self._choices = job, dialect, envelope, choices
        self._opened = [False] * len(choices)

    def chunks(self, delta: Delta) -> list[Json]:
        return [self._chunk([choice]) for choice in self._parts(delta)]

    def usage_chunk(self, report: Json) -> Json:
        return {**self._envelope.around(self._dialect.chunk_object, []), "usage": report}

    def _parts(self, delta: Delta) -> Iterator[Json]:
        if not self._opened[delta.index]:
            self._opened[delta.index] = True
            if opening := self._dialect.opening(delta.index):
                yield opening
        if delta.text or delta.calls or delta.tokens:
            yield self._dialect.piece(delta, with_logprobs=_wants_logprobs(self._choices[delta.index]))
        # Choices may be ahead of the deltas that tell of them.
        ending = self._choices[delta.index].ending
        if delta.finish_reason is not None and ending is not None:
            yield self._dialect.closing(delta.index, ending)

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._envelope.around(self._dialect.chunk_object, choices)
        if self._job.running_usage:
            chunk["usage"] = usage_counts(self._job, self._choices)
        elif self._job.include_usage:
            chunk["usage"] = None
        return chunk


class WholeAnswer:
    """Collects deltas into one body."""

    def __init__(self, dialect: Dialect[Any], envelope: Envelope, choices: Sequence[Choice]) -> None:
        self._dialect, self._envelope, self._choices = dialect, envelope, choices
        self._pieces: list[list[str]] = [[] for _ in choices]
        self._calls: list[dict[int, CallDelta]] = [{} for _ in choices]
        self._tokens: list[list[ShownToken]] = [[] for _ in choices]

    def add(self, delta: Delta) -> None:
        self._pieces[delta.index].append(delta.text)
        self._tokens[delta.index].extend(delta.tokens)
        calls = self._calls[delta.index]
        for piece in delta.calls:
            begun = calls.get(piece.index)
            calls[piece.index] = piece if begun is None else begun.followed_by(piece)

    def body(self, report: Json) -> Json:
        """Once every choice has its finish reason."""
        choices = [self._dialect.whole(self._answered(choice)) for choice in self._choices]
        return {**self._envelope.around(self._dialect.whole_object, choices), "usage": report}

    def _answered(self, choice: Choice) -> Answered:
        assert choice.ending is not None, "an answer is written when all its choices are done"
        index = choice.index
        tokens = tuple(self._tokens[index]) if _wants_logprobs(choice) else None
        calls = tuple(self._calls[index].values())
        return Answered(index, "".join(self._pieces[index]), calls, tokens, choice.ending)


def _wants_logprobs(choice: Choice) -> bool:
    return choice.request.sampling.num_logprobs is not None
