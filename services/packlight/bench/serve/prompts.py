"""Prompts as they are sent, and prose cut so that a prompt has exactly the tokens it should have.

Knows the tokenizer, the two APIs, and where a prompt's tag goes. Does not know what is asked.

With the completions API the chat template is applied here and the *text* is sent, because every server takes text; it
begins with the tag, so prompts with different tags differ from their first token on. With the chat API the server
applies its template: the tag is the system message, and the template's own first tokens (three for ChatML, less than
any cache's page) are the same for all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Literal

from packlight.core.errors import ConfigError
from packlight.evaluate.tasks.base import Message, assistant, user
from packlight.evaluate.tasks.essays import essay_sentences
from packlight.evaluate.tasks.words import ADJECTIVES, NOUNS
from packlight.models.fake_spec import FakeTokenizer
from packlight.models.tokenizer import ChatTokenizer

Api = Literal["completions", "chat"]
Tokenizer = ChatTokenizer | FakeTokenizer

# What is left when no other word fits. Each is one token in most vocabularies, and one of them in all.
_FILLERS = (" a", ".", "!")


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of a conversation. `answer_prefix` begins the assistant's turn: a model that would chat goes straight on
    to the answer. `references` are the strings that a right answer contains; empty if none is right."""

    content: str
    answer_prefix: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    question: Question
    answer: str


class Prompts:
    """Prompts of one model for one API."""

    def __init__(self, tokenizer: Tokenizer, api: Api) -> None:
        self._tokenizer, self._api = tokenizer, api

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self._api == "chat" else "/v1/completions"

    def fields(self, tag: str, question: Question, past: Sequence[Exchange] = ()) -> dict[str, Any]:
        """The fields of a request's body that say what is asked."""
        if self._api == "chat":
            return {"messages": self._messages(tag, question, past)}
        return {"prompt": self._text(tag, question, past)}

    def count(self, tag: str, question: Question, past: Sequence[Exchange] = ()) -> int:
        """Tokens of the whole prompt, the template's own included."""
        if self._api == "chat":
            return len(self._tokenizer.apply_chat_template(self._messages(tag, question, past)))
        return len(self._tokenizer.encode(self._text(tag, question, past)))

    def count_text(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def tags(self, seed: str, num_tags: int) -> list[str]:
        """Openings that begin with different tokens, as far as the words last (some hundreds)."""
        rng, by_first_token = Random(f"tags/{seed}"), dict[int, str]()
        for adjective in rng.sample(ADJECTIVES, len(ADJECTIVES)):
            by_first_token.setdefault(self._tokenizer.encode(adjective)[0], adjective)
        first = list(by_first_token.values())
        return [f"{first[index % len(first)]} {rng.choice(NOUNS)} {rng.choice(NOUNS)}" for index in range(num_tags)]

    def _text(self, tag: str, question: Question, past: Sequence[Exchange]) -> str:
        return f"{tag}\n{self._render(_dialogue(question, past))}{question.answer_prefix}"

    def _messages(self, tag: str, question: Question, past: Sequence[Exchange]) -> list[Message]:
        return [{"role": "system", "content": tag}, *_dialogue(question, past)]

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if isinstance(self._tokenizer, FakeTokenizer):
            return "".join(message["content"] for message in messages)
        return self._tokenizer.render(messages)


def _dialogue(question: Question, past: Sequence[Exchange]) -> list[Message]:
    """The conversation so far, and the question."""
    before = [
        message
        for exchange in past
        for message in (
            user(exchange.question.content),
            assistant(exchange.question.answer_prefix + exchange.answer),
        )
    ]
    return [*before, user(question.content)]


def cut_to(
    num_tokens: int,
    write: Callable[[Sequence[str]], Question],
    count: Callable[[Question], int],
    seed: str,
    max_words: int | None = None,
) -> Question:
    """What `write` makes of so much prose, given as sentences, that `count` says `num_tokens`.

    Whole words first, `max_words` at most, then the shortest fillers there are. Raises ConfigError if it is longer
    without any prose."""
    words = _prose(seed, num_tokens if max_words is None else max_words)

    def written(num_words: int, filler: str = "") -> Question:
        return write(_sentences(words[:num_words], filler))

    num_words = bisect_right(range(len(words) + 1), num_tokens, key=lambda num: count(written(num))) - 1
    if num_words < 0:
        least = count(written(0))
        raise ConfigError(f"a prompt of {num_tokens} tokens is too short: it needs at least {least}; ask for more")
    filler = ""
    for unit in _FILLERS:
        while count(written(num_words, filler + unit)) <= num_tokens:
            filler += unit
    return written(num_words, filler)


def _prose(seed: str, num_words: int) -> list[str]:
    """At least so many words, for a word has at least a token."""
    words: list[str] = []
    sentences = essay_sentences(Random(f"prose/{seed}").getrandbits(64))
    while len(words) < num_words:
        words += next(islice(sentences, 1)).split(" ")
    return words


def _sentences(words: Sequence[str], filler: str) -> list[str]:
    """The words as sentences again; the last one may be cut short, and the filler ends it."""
    sentences: list[str] = []
    current: list[str] = []
    for word in words:
        current.append(word)
        if word.endswith("."):
            sentences.append(" ".join(current))
            current = []
    if current:
        sentences.append(" ".join(current))
    return [*sentences[:-1], sentences[-1] + filler] if sentences else [filler] * bool(filler)
