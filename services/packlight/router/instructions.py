"""How much of a conversation's beginning instructs the model: its system prompt, and the turns that show how to answer.

Knows messages and the tokens a template makes of them. A document in the middle of a conversation may be dropped token
by token; what the model was told to be and do may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, takewhile
from types import MappingProxyType

from packlight.core.errors import InvalidRequest
from packlight.router.schema import Message

Tokenise = Callable[[Sequence[Message]], list[int]]

# Who may speak after whom in a run.
_TURNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"": ("system", "user"), "system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}
)
# A message of more bytes per token than this is hardly written by a person, and not worth tokenising twice.
_BYTES_PER_TOKEN = 8
_TOKENS_AROUND_MESSAGE = 4


def num_instructing_tokens(
    messages: Sequence[Message], token_ids: Sequence[int], limit: int, tokenise: Tokenise
) -> int:
    """Of the prompt `token_ids`, how many first tokens the longest run of leading messages takes that fits in `limit`.

    A run is the system messages, then whole turns of user and assistant, never the last question. Its tokens are those
    that the prompt shares with a conversation in which something else is asked after the run; so templates that put the
    system prompt inside a question are understood too. `tokenise` is given short conversations only, and few."""
    runs = _short_runs(messages, limit * _BYTES_PER_TOKEN)
    low, high, best = 0, len(runs), 0
    middle = high - 1  # mostly all of them fit
    while low < high:
        num_tokens = _num_shared(messages, runs[middle], token_ids, tokenise)
        if num_tokens <= limit:
            best, low = num_tokens, middle + 1
        else:
            high = middle
        middle = (low + high) // 2
    return best


def _short_runs(messages: Sequence[Message], max_bytes: int) -> list[int]:
    """How many messages each run has that is short enough, ascending. A question follows every run."""
    runs, num_bytes, before = [], 0, ""
    for index, (message, following) in enumerate(pairwise(messages), start=1):
        num_bytes += len((message.content or "").encode()) + _TOKENS_AROUND_MESSAGE * _BYTES_PER_TOKEN
        role = "system" if message.role == "developer" else message.role
        if role not in _TURNS[before] or num_bytes > max_bytes:
            break
        if role != "user" and following.role == "user":
            runs.append(index)
        before = role
    return runs


def _num_shared(messages: Sequence[Message], run: int, token_ids: Sequence[int], tokenise: Tokenise) -> int:
    """The tokens before the question that follows the run: those that do not change when it does. None where the
    template refuses the shorter conversation."""
    question = (messages[run].content or "").lstrip()
    other = Message(role="user", content="1" if question.startswith("0") else "0")
    try:
        other_ids = tokenise([*messages[:run], other])
    except InvalidRequest:
        return 0
    pairs = zip(other_ids, token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
