"""From a scenario to a plan: instants, prompts of exact length, and whether the model can read them.

Knows the tokenizer, through `packlight.bench.serve.prompts`. A pure function of its arguments: arrivals follow from the
scenario's seed, words from the seed of the prompts. A server that is still up remembers the prompts of the run before,
so those two are apart: the same load again, in other words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from loadtest.plan import Plan, PlannedConversation, PlannedTurn
from loadtest.replay import BLOCK_TOKENS, BlockTexts, Scaled, read_trace, scale
from loadtest.scenario import Prompts as Asked
from loadtest.scenario import Scenario, Trace
from loadtest.schedule import due_times, stretches
from packlight.bench.serve.prompts import Prompts
from packlight.bench.serve.workloads import WORKLOADS, Conversation, Size
from packlight.core.errors import ConfigError
from packlight.evaluate.tasks.needles import Fact, needle

_FACT = Fact("quarrelsome-afternoon", "1234567")


def make_plan(
    scenario: Scenario, source: Path, prompts: Prompts, body: Mapping[str, Any], seed: int, max_context: int
) -> Plan:
    """`source` is the scenario's file. Raises ConfigError for prompts that are too short to be written, or longer than
    the model reads, for a trace that cannot be read, and when no request is due."""
    if isinstance(scenario.arrivals, Trace):
        conversations, notes = _replayed(scenario, scenario.arrivals, source, prompts, seed, max_context)
    else:
        parts = stretches(scenario.arrivals, scenario.duration_s)
        due_s = due_times(parts, scenario.arrivals.process, str(scenario.seed))
        asked = scenario.prompts
        assert asked is not None, "a scenario without a trace has prompts"
        _check_fits(asked, source, max_context)
        conversations, notes = tuple(_asked(asked, due_s, prompts, scenario.seed, seed)), ()
    if not conversations:
        raise ConfigError(f"{source}: no request is due within duration_s {scenario.duration_s:g}; make it longer")
    return Plan(
        scenario=source.stem,
        duration_s=scenario.duration_s,
        drain_s=scenario.drain_s,
        max_in_flight=scenario.max_in_flight,
        body=dict(body),
        conversations=conversations,
        notes=notes,
    )


def _check_fits(asked: Asked, source: Path, max_context: int) -> None:
    """Later turns carry what was said before."""
    later = (asked.turns - 1) * (asked.question_tokens + asked.max_tokens)
    longest = max(asked.prompt_tokens) + later + asked.max_tokens
    if longest > max_context:
        raise ConfigError(
            f"{source}: prompts: conversations of {longest} tokens do not fit the model, which reads {max_context}; "
            f"try --set prompts.prompt_tokens={max(1, max_context - later - asked.max_tokens)}"
        )


def _asked(
    asked: Asked, due_s: Sequence[float], prompts: Prompts, arrivals_seed: int, seed: int
) -> Iterator[PlannedConversation]:
    """Lengths, documents and pauses are part of the load: they are drawn as arrivals are."""
    rng = Random(f"sizes/{arrivals_seed}")
    groups = [(rng.choice(asked.prompt_tokens), rng.randrange(asked.documents)) for _ in due_s]
    made = {group: _make(asked, group, num, prompts, seed) for group, num in Counter(groups).items()}
    for at_s, group in zip(due_s, groups, strict=True):
        yield _planned(next(made[group]), at_s, asked, rng)


def _make(asked: Asked, group: tuple[int, int], num: int, prompts: Prompts, seed: int) -> Iterator[Conversation]:
    """All conversations of one length and one document, which has room for only so many."""
    length, document = group
    most = most_questions(length - asked.question_tokens, prompts) if asked.kind == "shared_document" else num
    for first in range(0, num, most):
        size = Size(
            prompt_tokens=length,
            num_conversations=min(most, num - first),
            question_tokens=asked.question_tokens,
            num_turns=asked.turns,
        )
        yield from WORKLOADS[asked.kind].make(size, f"{seed}/{length}/{document}/{first}", prompts)


def most_questions(document_tokens: int, prompts: Prompts) -> int:
    """A document holds the answer to each question about it, in a sentence of its own. At most half of it may be such
    sentences; then a new document takes its place."""
    return max(1, document_tokens // (2 * prompts.count_text(f" {needle('number', _FACT)}")))


def _planned(conversation: Conversation, due_s: float, asked: Asked, rng: Random) -> PlannedConversation:
    turns = [
        PlannedTurn(
            content=question.content,
            max_tokens=asked.max_tokens,
            think_s=rng.expovariate(1 / asked.think_s) if index and asked.think_s else 0.0,
            references=question.references,
        )
        for index, question in enumerate(conversation.questions)
    ]
    return PlannedConversation(
        due_s=due_s, system=conversation.tag, turns=tuple(turns), is_follow_up=conversation.is_follow_up
    )


def _replayed(
    scenario: Scenario, trace: Trace, source: Path, prompts: Prompts, seed: int, max_context: int
) -> tuple[tuple[PlannedConversation, ...], tuple[str, ...]]:
    """The requests of a trace, and what was done to them."""
    scaled = scale(
        read_trace(_find_trace(trace.file, source)),
        duration_s=scenario.duration_s,
        speed=trace.speed,
        max_context=max_context,
        length_scale=trace.length_scale,
    )
    texts, seen = BlockTexts(prompts, scaled.block_tokens, str(seed)), set[int]()
    conversations = []
    for request in scaled.requests:
        turn = PlannedTurn(content=texts.question(request).content, max_tokens=request.output_tokens)
        is_known = bool(request.hash_ids) and request.hash_ids[0] in seen
        conversations.append(
            PlannedConversation(due_s=request.due_s, system=texts.system, turns=(turn,), is_follow_up=is_known)
        )
        seen.update(request.hash_ids[:1])
    return tuple(conversations), _notes(scaled, trace, texts.least_tokens)


def _find_trace(name: str, source: Path) -> Path:
    beside = source.parent / name
    return beside if beside.is_file() else Path(name)


def _notes(scaled: Scaled, trace: Trace, least_tokens: int) -> tuple[str, ...]:
    num_short = sum(request.input_tokens < least_tokens for request in scaled.requests)
    lengths = f"lengths x {scaled.length_scale:.3g} (blocks of {BLOCK_TOKENS} tokens became {scaled.block_tokens})"
    return (
        f"trace {Path(trace.file).name} at speed {trace.speed:g}, {lengths}",
        *([f"{scaled.num_clipped} prompts cut to what the model reads"] if scaled.num_clipped else []),
        *([f"{num_short} prompts lengthened to the chat template's {least_tokens} tokens"] if num_short else []),
    )
