"""How much of a conversation's beginning instructs the model: its system prompt, and the turns that show how to answer.

Knows messages and the tokens a template makes of them. A document in the middle of a conversation may be dropped token
by token; what the model was told to be and do may not.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from threading import Lock
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
# Longer beginnings are not remembered: they are rare, and must not fill the memory.
_MOST_REMEMBERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The tokens that a run of messages begins a prompt with, and the next one if something else were asked after it:
    one token id, or none where the other conversation has ended."""

    token_ids: array[int]
    next_if_other: array[int]

    @classmethod
    def shared(cls, token_ids: Sequence[int], other_ids: Sequence[int]) -> _Beginning:
        pairs = zip(other_ids, token_ids, strict=False)
        num = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return cls(array("I", other_ids[:num]), array("I", other_ids[num : num + 1]))

    def begins(self, token_ids: Sequence[int]) -> bool:
        """Whether it is what this prompt, too, would share with the other conversation."""
        num = len(self.token_ids)
        same, following = array("I", token_ids[:num]), array("I", token_ids[num : num + 1])
        return same == self.token_ids and (not following or following != self.next_if_other)


class Instructions:
    """Counts the tokens that instruct. Remembers how the last `max_runs` runs of messages began a prompt, as an
    application says the same to every request. What is remembered is compared with each prompt, so a template that
    writes the date is understood. Thread-safe."""

    def __init__(self, max_runs: int = 256) -> None:
        self._max_runs = max_runs
        self._known: OrderedDict[Hashable, _Beginning] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def num_tokens(
        self,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        limit: int,
        tokenise: Tokenise,
        options: Hashable = None,
        preface: str = "",
    ) -> int:
        """Of the prompt `token_ids`, how many first tokens the longest run of leading messages takes that fits in
        `limit`.

        A run is the system messages, then whole turns of user and assistant, never the last question. Its tokens are
        those that the prompt shares with a conversation in which something else is asked after the run; so templates
        that put the system prompt inside a question are understood too. `tokenise` is given short conversations only,
        and few; `options` are what else its tokens depend on. `preface` is what a prompt says before, or
        within, its first message, such as its tools: it instructs too, even before a question that nothing precedes.
        """
        runs = _short_runs(messages, limit * _BYTES_PER_TOKEN, preface)
        options = (options, preface)
        low, high, best = 0, len(runs), 0
        middle = high - 1  # mostly all of them fit
        while low < high:
            num_tokens = self._num_shared(messages, runs[middle], token_ids, tokenise, options)
            if num_tokens <= limit:
                best, low = num_tokens, middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        return best

    def _num_shared(
        self, messages: Sequence[Message], run: int, token_ids: Sequence[int], tokenise: Tokenise, options: Hashable
    ) -> int:
        """The tokens before the question that follows the run: those that do not change when it does. None where the
        template refuses the shorter conversation."""
        other = "1" if (messages[run].content or "").lstrip().startswith("0") else "0"
        key = (options, other, *map(_said, messages[:run]))
        beginning = self._recall(key)
        if beginning is None or not beginning.begins(token_ids):
            try:
                other_ids = tokenise([*messages[:run], Message(role="user", content=other)])
            except InvalidRequest:
                return 0
            beginning = _Beginning.shared(token_ids, other_ids)
            self._remember(key, beginning)
        return len(beginning.token_ids)

    def _recall(self, key: Hashable) -> _Beginning | None:
        with self._lock:
            beginning = self._known.get(key)
            if beginning is not None:
                self._known.move_to_end(key)
            return beginning

    def _remember(self, key: Hashable, beginning: _Beginning) -> None:
        if len(beginning.token_ids) > _MOST_REMEMBERED_TOKENS:
            return
        with self._lock:
            self._known[key] = beginning
            self._known.move_to_end(key)
            while len(self._known) > self._max_runs:
                self._known.popitem(last=False)


def _short_runs(messages: Sequence[Message], max_bytes: int, preface: str) -> list[int]:
    """How many messages each run has that is short enough, ascending. A question follows every run."""
    num_bytes, before = len(preface.encode()), ""
    runs = [0] if preface and num_bytes <= max_bytes and messages[0].role == "user" else []
    for index, (message, following) in enumerate(pairwise(messages), start=1):
        num_bytes += len((message.content or "").encode()) + _TOKENS_AROUND_MESSAGE * _BYTES_PER_TOKEN
        role = "system" if message.role == "developer" else message.role
        if role not in _TURNS[before] or num_bytes > max_bytes:
            break
        if role != "user" and following.role == "user":
            runs.append(index)
        before = role
    return runs


def _said(message: Message) -> Hashable:
    """All that a template sees of a message."""
    return message.role, message.content, message.name, message.tool_call_id, repr(message.tool_calls)
