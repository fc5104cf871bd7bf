"""What is asked: conversations of exact length, new in every turn.

    chat             a short message, no right answer; 128 tokens in, 128 out
    long_document    a question about a long text; the needle that answers it stands in the middle
    shared_document  many questions about one long text: everything but the question is the same
    multi_turn       conversations about a long text; every turn carries all that was said before

Knows sizes, needles (RULER, arXiv 2404.06654) and their wording. Knows no server. A pure function of its arguments:
the same seed gives the same conversations, another one others that share nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from types import MappingProxyType

from packlight.bench.serve.prompts import Prompts, Question, cut_to
from packlight.evaluate.tasks.haystack import hide
from packlight.evaluate.tasks.needles import Fact, ask, begin_answer, introduce, needle
from packlight.evaluate.tasks.words import distinct, draw_key, draw_number

_KIND = "number"
_MIDDLE = 0.5


@dataclass(frozen=True, slots=True)
class Conversation:
    """`is_follow_up`: an earlier conversation of the same turn begins with the same text."""

    tag: str
    questions: tuple[Question, ...]
    is_follow_up: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """`prompt_tokens` are those of a conversation's first prompt, whole. `question_tokens` of them follow what is
    shared; later turns add as many."""

    prompt_tokens: int
    num_conversations: int
    question_tokens: int
    num_turns: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What `--workload` chooses, with the sizes it has unless flags say otherwise. `num_conversations` None: as many as
    run at once."""

    summary: str
    make: Callable[[Size, str, Prompts], list[Conversation]]
    prompt_tokens: int
    max_tokens: int
    num_conversations: int | None = None
    question_tokens: int = 80
    num_turns: int = 1


def _chat(size: Size, seed: str, prompts: Prompts) -> list[Conversation]:
    return [
        Conversation(tag, (_message(size.prompt_tokens, tag, f"{seed}/{index}", prompts),))
        for index, tag in enumerate(prompts.tags(seed, size.num_conversations))
    ]


def _message(num_tokens: int, tag: str, seed: str, prompts: Prompts) -> Question:
    def write(sentences: Sequence[str]) -> Question:
        return Question(" ".join([*sentences, "What happened next?"]))

    return cut_to(num_tokens, write, lambda question: prompts.count(tag, question), seed)


def _long_document(size: Size, seed: str, prompts: Prompts) -> list[Conversation]:
    return [
        Conversation(tag, (_about_document(size.prompt_tokens, _facts(f"{seed}/{index}", 1), tag, seed, prompts),))
        for index, tag in enumerate(prompts.tags(seed, size.num_conversations))
    ]


def _shared_document(size: Size, seed: str, prompts: Prompts) -> list[Conversation]:
    """The document takes what the question leaves of each prompt."""
    (tag,) = prompts.tags(seed, 1)
    facts = _facts(seed, size.num_conversations)
    document = _document(size.prompt_tokens - size.question_tokens, facts, tag, seed, prompts)

    def count(question: Question) -> int:
        return prompts.count(tag, question)

    return [
        Conversation(
            tag,
            (cut_to(size.prompt_tokens, _asking(document, fact), count, f"{seed}/{index}", size.question_tokens),),
            is_follow_up=index > 0,
        )
        for index, fact in enumerate(facts)
    ]


def _multi_turn(size: Size, seed: str, prompts: Prompts) -> list[Conversation]:
    """The first turn brings the text, the others only ask."""
    conversations = []
    for index, tag in enumerate(prompts.tags(seed, size.num_conversations)):
        own = f"{seed}/{index}"
        facts = _facts(own, size.num_turns)
        first = _about_document(size.prompt_tokens, facts, tag, own, prompts)
        later = [
            cut_to(
                size.question_tokens,
                _asking("", fact),
                lambda question: prompts.count_text(question.content + question.answer_prefix),
                f"{own}/question {fact.key}",
            )
            for fact in facts[1:]
        ]
        conversations.append(Conversation(tag, (first, *later)))
    return conversations


def _facts(seed: str, num_facts: int) -> list[Fact]:
    keys, values = Random(f"keys/{seed}"), Random(f"values/{seed}")
    return list(islice(map(Fact, distinct(draw_key, keys), distinct(draw_number, values)), num_facts))


def _about_document(num_tokens: int, facts: Sequence[Fact], tag: str, seed: str, prompts: Prompts) -> Question:
    """Asks for the first of the facts hidden in a text."""

    def write(sentences: Sequence[str]) -> Question:
        return _asking(_hidden(facts, sentences), facts[0])([])

    return cut_to(num_tokens, write, lambda question: prompts.count(tag, question), f"{seed}/{facts[0].key}")


def _document(num_tokens: int, facts: Sequence[Fact], tag: str, seed: str, prompts: Prompts) -> str:
    """The text alone; a prompt that asked nothing about it would have `num_tokens`."""

    def write(sentences: Sequence[str]) -> Question:
        return Question(_hidden(facts, sentences))

    return cut_to(num_tokens, write, lambda question: prompts.count(tag, question), seed).content


def _asking(document: str, fact: Fact) -> Callable[[Sequence[str]], Question]:
    """The document, then some more prose if there is any, then the question."""

    def write(sentences: Sequence[str]) -> Question:
        parts = [document, " ".join(sentences), ask(_KIND, [fact])]
        return Question("\n".join(filter(None, parts)), begin_answer(_KIND, [fact]), (fact.value,))

    return write


def _hidden(facts: Sequence[Fact], sentences: Sequence[str]) -> str:
    """One needle stands in the middle; several stand evenly apart."""
    depths = [_MIDDLE] if len(facts) == 1 else [(index + 0.5) / len(facts) for index in range(len(facts))]
    needles = [(depth, needle(_KIND, fact)) for depth, fact in zip(depths, facts, strict=True)]
    return f"{introduce(_KIND, len(facts))}\n{hide(needles, sentences)}"


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "chat": Workload("a short message", _chat, prompt_tokens=128, max_tokens=128),
        "long_document": Workload("a question about a long text", _long_document, prompt_tokens=7000, max_tokens=64),
        "shared_document": Workload(
            "many questions about one long text", _shared_document, 6580, max_tokens=32, num_conversations=16
        ),
        "multi_turn": Workload("conversations about a long text", _multi_turn, 2000, max_tokens=64, num_turns=4),
    }
)
