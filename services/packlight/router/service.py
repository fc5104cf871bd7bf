"""The seam between the HTTP half of the router and everything behind it.

Knows what the HTTP half needs: a backend that answers one `GenerateRequest` with events, a tokenizer, a model to name.
Does not know how either works: placement, retries and gRPC are the backend's, files and vocabularies the tokenizer's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from packlight.compress.policy import Decision, Plan
from packlight.core.types import GenerateEvent, GenerateRequest, ModelSpec, RequestId
from packlight.core.workers import WorkerInfo


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether new requests can be served now, and why (JSON values: worker counts, index availability, ...)."""

    ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decided:
    """The request has a place, so it is settled how its prompt's KV is packed: in this attempt and all later ones."""

    request_id: RequestId
    decision: Decision


BackendEvent = Decided | GenerateEvent


class Backend(Protocol):
    """What stands behind the HTTP API. One method makes answers, one says whether it can, one with whom."""

    def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[BackendEvent, None]:
        """The events of one answer: `Decided` at most once, `Tokens` and `Progress` ..., then exactly one of `Finished`
        | `Failed`. The prompt is packed by `plan`, or as `request.pack` says where there is none.

        Closing the generator (`aclose`, or cancelling the task that awaits it) cancels everything behind it. Raises
        PacklightError before the first event when the request cannot be started (queue full, no worker, ...)."""
        ...

    def readiness(self) -> Readiness:
        """Cheap and immediate: it answers probes."""
        ...

    def workers(self) -> Sequence[WorkerInfo]:
        """The fleet as it was last heard of."""
        ...


class Tokenizer(Protocol):
    """Text to tokens and tokens to bytes. Called from worker threads, so its methods must be thread-safe."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The tokens of plain text; `add_special_tokens` adds what the model wants before a text (a BOS)."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; they may be part of a UTF-8 character."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether the token is control (end of turn, padding, ...) and never part of an answer's text."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        **kwargs: Any,
    ) -> list[int]:
        """The tokens of a conversation; `kwargs` are `add_generation_prompt` and variables of the template. Raises
        InvalidRequest when the template refuses the messages."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    spec: ModelSpec
    tokenizer: Tokenizer
