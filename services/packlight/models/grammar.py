"""Grammars that an answer can be held to, and how far one answer has come in its own. Needs llguidance, never torch.

A grammar is text in llguidance's form, so it travels as it is: the router makes and checks it, workers follow it.
Following is a function of the grammar and the tokens so far; a worker that takes an answer over replays them, in a
fraction of a millisecond, and allows what the first one would have allowed.

Knows vocabularies as bytes. Does not know requests, sampling or where a prompt ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from packlight.core.errors import InternalError, InvalidRequest, PacklightError
from packlight.core.types import ModelSpec
from packlight.models.schema_bounds import check_schema

MAX_GRAMMAR_CHARS = 256 << 10
MAX_REASON_CHARS = 300
# As models write JSON when nobody holds them to it. Free white space lets a small model write blanks for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Mask = npt.NDArray[np.bool_]


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...


def json_grammar(schema: Mapping[str, Any], *, is_lenient: bool = False) -> str:
    """Answers that are JSON of this schema. Keywords that cannot be held to make a lenient grammar say so in
    `check_grammar`, and another one an error there. Raises InvalidRequest for a schema that is not to be compiled."""
    check_schema(schema)
    options: Any = {**_SPACING, "lenient": is_lenient}
    return LLMatcher.grammar_from_json_schema(dict(schema), overrides=options)


def regex_grammar(pattern: str) -> str:
    """Answers that `pattern`, in Rust's syntax, matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """Answers that are one of `choices`, none of them empty."""
    return lark_grammar(f"start: {' | '.join(map(literal, choices))}")


def lark_grammar(rules: str) -> str:
    """Answers that follow `rules`, in llguidance's dialect of Lark. They begin at `start`."""
    return LLMatcher.grammar_from_lark(rules)


def literal(text: str) -> str:
    """Of a rule: exactly this text, which is not empty."""
    return _quoted(text)


def special_token(token_id: int) -> str:
    """Of a rule: a token that has no text."""
    return f"<[{token_id}]>"


def json_of(schema: Mapping[str, Any], *, is_lenient: bool = False) -> str:
    """Of a rule: JSON of this schema, as in `json_grammar`."""
    check_schema(schema)
    options = {"x-guidance": {**_SPACING, "lenient": is_lenient}}
    return f"%json {_quoted({**schema, **options})}"


def _quoted(value: Any) -> str:
    """Literals of Lark are written as those of JSON, but for DEL, which stands in none."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_grammar(grammar: str) -> list[str]:
    """What the grammar leaves unsaid. Raises InvalidRequest, with the reason, for one that nothing can follow."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"it has {len(grammar)} characters as a grammar, the limit is {MAX_GRAMMAR_CHARS}")
    with _panics_as(InvalidRequest("it cannot be compiled: write it in another way")):
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise InvalidRequest(" ".join(messages[0].split())[:MAX_REASON_CHARS])
    return messages


@contextmanager
def _panics_as(error: PacklightError) -> Iterator[None]:
    """A bug of llguidance is a panic, which passes by everything that waits for an `Exception`."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error from panic


class Grammars:
    """What it takes to follow grammars in one model's tokens. Making it reads the whole vocabulary once, which takes a
    quarter of a second for 50,000 tokens; it does not change afterwards, so threads may share it."""

    def __init__(self, vocabulary: Vocabulary, num_tokens: int, eos_token_ids: Sequence[int]) -> None:
        """`num_tokens` is the number of logits. There is at least one end token."""
        wrapper = TokenizerWrapper(_Spelled(vocabulary, num_tokens, eos_token_ids[0]))
        self._num_tokens = num_tokens
        self._tokenizer = LLTokenizer(wrapper, n_vocab=num_tokens, eos_token=list(eos_token_ids))

    def follow(self, grammar: str, token_ids: Iterable[int] = ()) -> Constraint:
        """Of an answer that begins with `token_ids`."""
        return Constraint(self._tokenizer, self._num_tokens, grammar, token_ids)


def open_grammars(vocabulary: Vocabulary, spec: ModelSpec) -> Grammars | None:
    """None for a model that names no end token: an answer could not end where its grammar does."""
    return Grammars(vocabulary, spec.vocab_size, spec.eos_token_ids) if spec.eos_token_ids else None


def constraint_of(grammars: Grammars | None, grammar: str, token_ids: Iterable[int]) -> Constraint | None:
    """None for an empty grammar. Raises InvalidRequest for a model whose answers have no end."""
    if not grammar:
        return None
    if grammars is None:
        raise InvalidRequest("the model names no end token, so its answers cannot be held to a grammar")
    return grammars.follow(grammar, token_ids)


class Constraint:
    """A grammar and one answer's way through it. Tokens are noted where they arrive; the work of reading them is done
    by who asks what may come next, so only that takes time: microseconds, and once some milliseconds."""

    def __init__(self, tokenizer: LLTokenizer, num_tokens: int, grammar: str, token_ids: Iterable[int]) -> None:
        self._tokenizer, self._num_tokens, self._grammar = tokenizer, num_tokens, grammar
        self._unread = list(token_ids)
        self._matcher: LLMatcher | None = None

    def add(self, token_id: int) -> None:
        """The answer goes on with it."""
        self._unread.append(token_id)

    def allowed(self) -> Mask:
        """[V]: whether each token may come next. An end token may when the grammar is satisfied.

        Raises InvalidRequest for a grammar that cannot even begin; InternalError when it gets too complex later, or
        tokens were added that it forbids."""
        with _panics_as(InternalError("the answer cannot be held to its grammar any longer: llguidance panicked")):
            bits = np.frombuffer(self._read(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._num_tokens, bitorder="little").view(np.bool_)

    def _read(self) -> bytes:
        unread, self._unread = self._unread, []
        has_begun = self._matcher is not None or bool(unread)
        if self._matcher is None:
            self._matcher = LLMatcher(self._tokenizer, self._grammar, log_level=0)
        self._matcher.consume_tokens(unread)
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            if not has_begun:
                raise InvalidRequest(f"no answer can be held to the grammar: {reason}")
            raise InternalError(f"the answer cannot be held to its grammar any longer: {reason}")
        return mask


class _Spelled:
    """A vocabulary as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, num_tokens: int, eos_token_id: int) -> None:
        self._vocabulary, self.eos_token_id = vocabulary, eos_token_id
        self.tokens = [vocabulary.token_bytes(token_id) for token_id in range(num_tokens)]
        self.special_token_ids = [token_id for token_id in range(num_tokens) if vocabulary.is_special(token_id)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.encode(text if isinstance(text, str) else text.decode())
