"""What differs between chat completions and plain completions, as one interface.

Knows nothing itself. A dialect turns a body into prompts and a choice into JSON; everything between is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from packlight.router.choice import Delta, ShownToken
from packlight.router.schema import Body
from packlight.router.tools.calls import CallDelta
from packlight.router.tools.model import CallRules

B = TypeVar("B", bound=Body)
Json = dict[str, Any]

# -inf is not JSON. Log-probabilities are those of the raw distribution, before penalties, temperature and filters.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete choice. `calls` are whole, in their order; `tokens` is None when no log-probabilities are wanted."""

    index: int
    text: str
    calls: tuple[CallDelta, ...]
    tokens: tuple[ShownToken, ...] | None
    reason: str


class Dialect(Protocol[B]):
    """`name` labels metrics and `prompt_param` is the field that holds the prompt. The two `object` names are OpenAI's,
    for a chunk of a stream and for a whole answer."""

    name: str
    id_prefix: str
    prompt_param: str
    chunk_object: str
    whole_object: str
    body_type: type[B]

    def prompts(self, body: B, max_prompts: int) -> list[list[int]]:
        """The tokens of every prompt. Raises InvalidRequest or ContextLengthExceeded."""
        ...

    def is_reasoning(self, body: B) -> bool:
        """Whether the model is likely to think before it answers: such an answer needs more of the prompt."""
        ...

    def num_instructing(self, body: B, token_ids: Sequence[int], limit: int) -> int:
        """How many of the prompt's first tokens instruct rather than ask: 0, or at most `limit`."""
        ...

    def call_rules(self, body: B, token_ids: Sequence[int]) -> CallRules | None:
        """What may be called in the answer to a prompt, and how. Raises InvalidRequest."""
        ...

    def opening(self, index: int) -> Json | None:
        """What a stream says of a choice before its text."""
        ...

    def piece(self, delta: Delta, *, with_logprobs: bool) -> Json: ...

    def closing(self, index: int, reason: str) -> Json: ...

    def whole(self, answered: Answered) -> Json: ...


def clip(logprob: float | None) -> float:
    assert logprob is not None, "the backend must send log-probabilities when they are asked for"
    return max(MIN_LOGPROB, logprob)
