"""One decode step, and the prefill of one prompt, of a real model through the engine's runner.

Knows runners. A step is what a decode worker's compute thread does: room for the next token, the model, and a sampled
token per row. Its floor is the bytes it cannot avoid reading - weights once, KV of every row - at read bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from packlight.attention.registry import BACKENDS
from packlight.bench.micro.measure.packing import kept_lengths
from packlight.bench.micro.measure.rows import Layout, Rows, make_rows
from packlight.bench.micro.measure.weights import weight_bytes
from packlight.bench.stream import Stream, synced
from packlight.bench.timing import Spread, seconds_of, slices_of, take_turns
from packlight.core.types import PackSpec, SamplingParams
from packlight.engine.runner import ChunkWork, DecodeRunner, Runner
from packlight.engine.sampler import SampleRow, sample
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.models.base import LanguageModel


@dataclass(frozen=True, slots=True)
class Point:
    """A step to measure: `batch` rows of prompts of `context` tokens, packed by `pack`."""

    batch: int
    context: int
    recipe: str
    pack: PackSpec


@dataclass(frozen=True, slots=True)
class Question:
    """How it is measured: by which backends, over what memory. `slice_s` is the time of one backend in one round."""

    layout: Layout
    attentions: tuple[str, ...]
    num_rounds: int
    slice_s: float
    with_profile: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One measured step. `floor_s` is its bytes at the read bandwidth of the same round."""

    point: Point
    attention: str
    seconds: Spread
    floor_s: Spread
    kv_bytes: int
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    attention: str
    num_tokens: int
    seconds: Spread


class Stepper:
    """Steps the same rows again and again: the next token is stored, never counted, so every step is alike."""

    def __init__(self, model: LanguageModel, rows: Rows, attention: str, context: int) -> None:
        self._runner = DecodeRunner(model, rows.pool, BACKENDS.load(attention)())
        self._rows, self._context = rows, context
        self._sampled = [SampleRow(SamplingParams(temperature=0.0), context + 1) for _ in rows.rows]

    def step(self) -> None:
        rows, num_rows = list(self._rows.rows), len(self._rows.rows)
        self._rows.table.grow(rows)
        logits_RV = self._runner.decode(
            self._rows.table,
            rows,
            [1] * num_rows,
            [self._context] * num_rows,
            reads=self._rows.reads(num_rows),
            summaries=self._rows.summaries,
        )
        sample(logits_RV, self._sampled)


def measure_point(model: LanguageModel, point: Point, question: Question, stream: Stream) -> list[Step]:
    """Backends and the stream in turns."""
    rows = _rows(model, point, question.layout)
    steppers = {name: Stepper(model, rows, name, point.context) for name in question.attentions}
    device = question.layout.device
    subjects = {name: slices_of(synced(stepper.step, device), question.slice_s) for name, stepper in steppers.items()}
    seconds = take_turns({**stream.subjects(), **subjects}, question.num_rounds)
    _, stream_s = stream.limit(seconds)
    kv_bytes = sum(rows.layer_bytes(layer, point.batch) for layer in range(model.spec.num_layers))
    floor_s = stream_s.times((weight_bytes(model) + kv_bytes) / stream.num_bytes)
    return [
        Step(point, name, seconds[name], floor_s, kv_bytes, profile(stepper.step) if question.with_profile else None)
        for name, stepper in steppers.items()
    ]


def measure_prefill(
    model: LanguageModel, num_tokens: int, question: Question, chunk_tokens: int, num_rounds: int
) -> list[Prefill]:
    """The prompt is computed in chunks of `chunk_tokens`, by each backend in turns."""
    layout, attentions = question.layout, question.attentions
    num_blocks = -(-num_tokens // layout.page_size)
    pool = KVPool(
        model.spec, num_blocks=num_blocks, page_size=layout.page_size, dtype=layout.dtype, device=layout.device
    )
    runners = {name: Runner(model, pool, BACKENDS.load(name)()) for name in attentions}
    subjects = {
        name: partial(seconds_of, synced(partial(_prefill, runner, num_tokens, chunk_tokens), layout.device))
        for name, runner in runners.items()
    }
    seconds = take_turns(subjects, num_rounds)
    return [Prefill(name, num_tokens, seconds[name]) for name in attentions]


def profile(function: Callable[[], object], num_rows: int = 16) -> str:
    """torch.profiler's table of one call, the operators that take most of the time themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    averages = profiler.key_averages()
    shown: str = averages.table(sort_by="self_cpu_time_total", row_limit=num_rows, max_name_column_width=50)
    return shown


def _rows(model: LanguageModel, point: Point, layout: Layout) -> Rows:
    return make_rows(
        model.spec,
        layout,
        kept_lengths(model.spec, point.pack, point.context),
        num_rows=point.batch,
        pack=point.pack,
        num_prompt_tokens=point.context,
    )


def _prefill(runner: Runner, num_tokens: int, chunk_tokens: int) -> Tensor:
    """The logits after a prompt of no meaning."""
    blocks = PageBook(runner.pool.num_blocks).allocate(-(-num_tokens // runner.pool.page_size))
    logits_RV = torch.empty(0)
    for start in range(0, num_tokens, chunk_tokens):
        end = min(start + chunk_tokens, num_tokens)
        token_ids = [1 + position % (runner.model.spec.vocab_size - 1) for position in range(start, end)]
        logits_RV = runner.prefill([ChunkWork(token_ids, start, blocks, wants_logits=end == num_tokens)])
    return logits_RV
