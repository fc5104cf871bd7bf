"""Running an evaluation: every prompt is prefilled once, exactly, and every variant is packed and decoded from it.

What is measured is the served path: the same selection, packing, codecs, pool, readers and attention backend; nothing
is masked. Variants of about one size decode together as one batch.

Knows prompts, variants and the rows they become. Knows neither the command line nor files nor reports.

Legend: V vocabulary, R rows, L layers, C = query heads x head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from packlight.compress.recipes import find_recipe
from packlight.core.types import PackSpec
from packlight.engine.packed_rows import PackedRows
from packlight.engine.runner import Runner
from packlight.evaluate.exact import Anchor, Clock, ExactPrompt, Prefiller, Wanted
from packlight.evaluate.groups import Size, num_pages_of, plan_groups
from packlight.evaluate.observations import Fidelity, Observation
from packlight.evaluate.packing import Footprint, pack_prompt, pages_needed
from packlight.evaluate.plan import Plan
from packlight.evaluate.prompts import Prompt, Tokenizer, make_prompt
from packlight.evaluate.results import TEACHER_FORCED, TWO_TURN_ANEW, TWO_TURN_REUSED
from packlight.evaluate.scoring import all_match
from packlight.evaluate.streams import AnswerStream, Continuation, ContinuationStream, ForcedStream, Stream, greedy
from packlight.evaluate.tap import OutputTap
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.variants import Variant

EXACT = PackSpec()


@dataclass(frozen=True, slots=True)
class Limits:
    """What decoding may take at once: head pages of packed KV, and rows of a step."""

    max_pages: int
    max_rows: int = 48


@dataclass(slots=True)
class Entry:
    """One variant, packed at one anchor: a row for each stream."""

    variant: Variant
    anchor: Anchor
    task: str
    forced: ForcedStream | None = None
    answer: AnswerStream | None = None
    footprint: Footprint | None = None

    @property
    def streams(self) -> list[Stream]:
        return [stream for stream in (self.forced, self.answer) if stream is not None]


OnStep = Callable[[str, int], None]


class Harness:
    """Evaluates one model. `on_step` is told what is going on, and how many variants were finished."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        plan: Plan,
        limits: Limits,
        *,
        chunk_tokens: int,
        clock: Clock = time.perf_counter,
        on_step: OnStep = lambda what, num_done: None,
    ) -> None:
        """`runner`'s pool holds exact prompts, one at a time; packed rows get pools of their own."""
        self._tap = OutputTap(runner.backend)
        self._runner = Runner(runner.model, runner.pool, self._tap)
        self._tokenizer, self._plan, self._limits = tokenizer, plan, limits
        self._clock, self._on_step = clock, on_step
        self._prefiller = Prefiller(self._runner, chunk_tokens=chunk_tokens, clock=clock)
        self._spec = runner.model.spec

    def run(self) -> Iterator[list[Observation]]:
        """The observations of one prompt after the other.

        Raises ConfigError, RequestNeverFits or InternalError, which end the run; what was yielded stands."""
        for job in self._plan.jobs:
            what = f"{job.task} {job.length}"
            self._on_step(what, 0)
            prompt = make_prompt(job, self._tokenizer)
            exact = self._prefill(prompt)
            try:
                entries = self._entries(prompt, exact)
                for group in self._groups(entries):
                    self._decode(exact, group)
                    self._on_step(what, len(group))
            finally:
                self._prefiller.release(exact)
            yield [seen for entry in entries for seen in observe(prompt, entry, self._tokenizer)]

    # ── one prompt ───────────────────────────────────────────────────────────────────────────────────────────────

    def _prefill(self, prompt: Prompt) -> ExactPrompt:
        packs = [variant.spec for variant in self._plan.variants_of(prompt.job)]
        all_queries = any(find_recipe(pack.recipe).needs_all_queries for pack in packs)
        wanted = [Wanted(end, all_queries) for end in prompt.turn_ends]
        return self._prefiller.run(prompt.token_ids, wanted, max(pack.window for pack in packs))

    def _entries(self, prompt: Prompt, exact: ExactPrompt) -> list[Entry]:
        variants = self._plan.variants_of(prompt.job)
        if prompt.job.task == TWO_TURN:
            anew = [self._answering(prompt, exact, variant, TWO_TURN_ANEW) for variant in variants]
            return anew + [self._answering(prompt, exact, variant, TWO_TURN_REUSED) for variant in variants]
        continued = self._continue(exact)
        return [self._compared(prompt, exact, variant, continued) for variant in variants]

    def _compared(self, prompt: Prompt, exact: ExactPrompt, variant: Variant, continued: Continuation) -> Entry:
        """Forced along the exact continuation; and left alone with the question, if there is one."""
        start = len(exact.token_ids)
        entry = Entry(variant, exact.anchors[-1], prompt.job.task, ForcedStream(continued, start))
        if prompt.sample.references:
            entry.answer = self._answer(prompt, start, (greedy(exact.logits_V),), ())
        return entry

    def _answering(self, prompt: Prompt, exact: ExactPrompt, variant: Variant, task: str) -> Entry:
        """The second question, asked after a selection made for it, or fed to what the first one kept."""
        if task == TWO_TURN_ANEW:
            answer = self._answer(prompt, len(exact.token_ids), (greedy(exact.logits_V),), ())
            return Entry(variant, exact.anchors[-1], task, answer=answer)
        start = prompt.turn_ends[0]
        return Entry(variant, exact.anchors[0], task, answer=self._answer(prompt, start, (), exact.token_ids[start:]))

    def _answer(self, prompt: Prompt, position: int, beginning: Sequence[int], script: Sequence[int]) -> AnswerStream:
        references = prompt.sample.references
        return AnswerStream(
            position=position,
            max_tokens=min(prompt.sample.max_new_tokens, self._plan.max_new_tokens),
            eos_token_ids=self._spec.eos_token_ids,
            is_complete=lambda answer: all_match(self._tokenizer.decode(answer), references) == 1.0,
            script=script,
            answer=list(beginning),
        )

    def _continue(self, exact: ExactPrompt) -> Continuation:
        """The greedy continuation from all of the KV, decoded alone."""
        size = self._size(EXACT, len(exact.token_ids), self._plan.num_forced_tokens, num_rows=1)
        rows = self._rows([size])
        row = rows.open(EXACT, len(exact.token_ids))
        pack_prompt(exact, exact.anchors[-1], EXACT, rows, [row], self._clock)
        stream = ContinuationStream(
            greedy(exact.logits_V), len(exact.token_ids), self._plan.num_forced_tokens, self._spec.eos_token_ids
        )
        self._feed(rows, {row: stream})
        return stream.result()

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _groups(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        sizes = [self._entry_size(entry) for entry in entries]
        groups = plan_groups(sizes, max_pages=self._limits.max_pages, max_rows=self._limits.max_rows)
        return ([entries[index] for index in group] for group in groups)

    def _decode(self, exact: ExactPrompt, group: Sequence[Entry]) -> None:
        """Packs the entries of one group into rows, and feeds their streams to the end."""
        rows = self._rows([self._entry_size(entry) for entry in group])
        streams: dict[int, Stream] = {}
        for entry in group:
            pack = entry.variant.spec
            row_ids = [rows.open(pack, entry.anchor.num_tokens) for _ in entry.streams]
            entry.footprint = pack_prompt(exact, entry.anchor, pack, rows, row_ids, self._clock)
            streams |= zip(row_ids, entry.streams, strict=True)
        self._feed(rows, streams)

    def _feed(self, rows: PackedRows, streams: dict[int, Stream]) -> None:
        """Steps until every stream is done; rows that are leave the batch."""
        while running := [(row, stream) for row, stream in streams.items() if not stream.is_done]:
            logits_RV = rows.decode(
                [row for row, _ in running],
                [stream.token_id for _, stream in running],
                [stream.position for _, stream in running],
            )
            outputs_RLC = self._tap.outputs()
            for (_, stream), logits_V, outputs_LC in zip(running, logits_RV, outputs_RLC, strict=True):
                stream.take(logits_V, outputs_LC)

    def _rows(self, sizes: Sequence[Size]) -> PackedRows:
        num_rows = sum(size.num_rows for size in sizes)
        return PackedRows(self._runner, num_rows=num_rows, num_head_pages=num_pages_of(sizes))

    def _entry_size(self, entry: Entry) -> Size:
        num_new = self._plan.num_forced_tokens if entry.forced is not None else 0
        if entry.answer is not None:
            num_new = max(num_new, entry.answer.max_tokens + len(entry.answer.script))
        return self._size(entry.variant.spec, entry.anchor.num_tokens, num_new, num_rows=len(entry.streams))

    def _size(self, pack: PackSpec, num_tokens: int, num_new_tokens: int, *, num_rows: int) -> Size:
        page_size = self._runner.pool.page_size
        return Size(num_rows, pages_needed(pack, self._spec, num_tokens, page_size, num_new_tokens))


def observe(prompt: Prompt, entry: Entry, tokenizer: Tokenizer) -> list[Observation]:
    """What a decoded entry says: a score, a comparison, or both."""
    assert entry.footprint is not None, "the entry was decoded"
    length, depth = prompt.job.length, prompt.sample.depth
    seen = []
    if entry.answer is not None:
        answer = tuple(entry.answer.answer)
        score = all_match(tokenizer.decode(answer), prompt.sample.references)
        seen.append(Observation(entry.variant, entry.task, length, depth, entry.footprint, score, answer))
    if entry.forced is not None:
        forced = entry.forced
        fidelity = Fidelity(tuple(forced.kl_nats), tuple(forced.agrees), tuple(forced.errors))
        seen.append(Observation(entry.variant, TEACHER_FORCED, length, None, entry.footprint, fidelity=fidelity))
    return seen
