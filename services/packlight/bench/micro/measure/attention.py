"""Decode attention of one layer, backend by backend, beside the machine's read bandwidth.

Knows the attention seam. Layers take turns, so that KV comes from memory and not from a cache: with SmolLM2's shape,
8192 tokens and 8 rows a layer is 50 MB and the pool 1.5 GB.

Legend: B rows, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.attention.base import AttentionBackend, AttentionPlan, DecodeBatch
from packlight.attention.registry import BACKENDS
from packlight.bench.micro.measure.rows import Layout, Rows, make_rows
from packlight.bench.stream import GB, Stream
from packlight.bench.timing import Spread, slices_of, take_turns
from packlight.core.errors import PacklightError
from packlight.core.types import ModelSpec, PackSpec

ORACLE = "reference"
ORACLE_TOKENS = 16_384  # it takes seconds for more; bytes per second do not depend on the number of rows


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model, as far as attention sees it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "smollm2": Shape(num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
    "llama8b": Shape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is measured. Of large models only as many layers are laid out as fit into `memory_bytes`.

    `slice_s` is how long a backend is measured in one round, `budget_s` how long all rounds may take."""

    shape: Shape
    layout: Layout
    context: int
    batch: int
    backends: tuple[str, ...]
    sparse: float | None = None
    num_threads: int = 1
    num_rounds: int = 5
    slice_s: float = 0.3
    budget_s: float = 20.0
    memory_bytes: int = 1_600_000_000
    stream_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class Timed:
    """One backend: seconds of a layer, and the bytes that a layer has to read."""

    seconds: Spread
    num_bytes: int
    batch: int
    max_error: float | None

    @property
    def gbs(self) -> Spread:
        return self.seconds.per(self.num_bytes / GB)


@dataclass(frozen=True, slots=True)
class Answer:
    num_layers: int
    num_rounds: int
    kv_bytes: int
    stream_method: str
    stream_gbs: Spread
    stream_ways: dict[str, float]
    dense: dict[str, Timed]
    sparse: dict[str, Timed]
    skipped: dict[str, str]


class Inputs(NamedTuple):
    """The new tokens of a step, the same in every layer and for every backend."""

    q_BHD: Tensor
    k_BKD: Tensor
    v_BKD: Tensor

    def first(self, num_rows: int) -> Inputs:
        return Inputs(*(each[:num_rows] for each in self))


class Subject:
    """One backend over some rows. Each call is a slice: as many layers as fit, and the mean seconds of one."""

    def __init__(self, plan: AttentionPlan, num_layers: int, inputs: Inputs, slice_s: float) -> None:
        self.num_rows, self._plan, self._layers = len(inputs.q_BHD), plan, cycle(range(num_layers))
        self._inputs = inputs
        self.first_out_BHD = self._attend()
        self._take_slice = slices_of(self._attend, slice_s)

    def __call__(self) -> float:
        return self._take_slice()

    def _attend(self) -> Tensor:
        q_BHD, k_BKD, v_BKD = self._inputs
        scale, layer = q_BHD.shape[-1] ** -0.5, next(self._layers)
        with torch.inference_mode():
            return self._plan.attend(layer, q_BHD, k_BKD, v_BKD, scale=scale, sliding_window=None)


def measure(question: Question, on_progress: Callable[[str], None]) -> Answer:
    """Raises ConfigError for a codec that does not suit the shape."""
    spec, pack = _spec(question), _pack(question)
    stream = Stream(question.num_threads, question.stream_bytes)
    on_progress(f"filling {spec.num_layers} layers of {question.batch} x {question.context} tokens")
    lengths = [[question.context] * spec.num_kv_heads] * spec.num_layers
    rows = make_rows(
        spec, question.layout, lengths, num_rows=question.batch, pack=pack, num_prompt_tokens=question.context
    )
    subjects, skipped = _subjects(question, rows)
    on_progress(f"measuring {', '.join(subjects)} in {question.num_rounds} rounds")
    seconds = take_turns({**stream.subjects(), **subjects}, question.num_rounds, budget_s=question.budget_s)
    way, stream_s = stream.limit(seconds)
    return Answer(
        num_layers=spec.num_layers,
        num_rounds=len(stream_s.values),
        kv_bytes=sum(dense_bytes(rows, layer, question.batch) for layer in range(spec.num_layers)),
        stream_method=way,
        stream_gbs=stream_s.per(stream.num_bytes / GB),
        stream_ways=stream.rates(seconds),
        dense=_timed(rows, subjects, seconds, is_sparse=False),
        sparse=_timed(rows, subjects, seconds, is_sparse=True),
        skipped={**skipped, **{f"stream {name}": reason for name, reason in stream.skipped.items()}},
    )


def dense_bytes(rows: Rows, layer: int, num_rows: int) -> int:
    """K and V of all tokens of one layer."""
    lengths = rows.table.new_lengths(list(rows.rows[:num_rows]))[:, layer]
    return int(lengths.sum()) * rows.page_bytes // rows.pool.page_size


def _spec(question: Question) -> ModelSpec:
    shape, layout = question.shape, question.layout
    per_token = 2 * shape.num_kv_heads * shape.head_dim * layout.dtype.itemsize
    layer_bytes = per_token * question.batch * question.context
    return ModelSpec(
        name="bench",
        fingerprint="bench",
        num_layers=min(shape.num_layers, max(1, question.memory_bytes // layer_bytes)),
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=1,
        max_context=question.context + 1,
        eos_token_ids=(),
        dtype=str(layout.dtype).removeprefix("torch."),
    )


def _pack(question: Question) -> PackSpec | None:
    if question.sparse is None:
        return None
    return PackSpec("quest", ratio=question.sparse, params=(("dense_layers", 0.0),))


def _inputs(question: Question) -> Inputs:
    shape, generator = question.shape, torch.Generator().manual_seed(1)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    sizes = ((question.batch, num_heads, shape.head_dim) for num_heads in heads)
    return Inputs(*(torch.randn(size, generator=generator).to(question.layout.dtype) for size in sizes))


def _subjects(question: Question, rows: Rows) -> tuple[dict[str, Subject], dict[str, str]]:
    """By backend, and `<backend>/sparse` beside it; and why some are missing."""
    subjects: dict[str, Subject] = {}
    skipped: dict[str, str] = {}
    for name in question.backends:
        try:
            backend: AttentionBackend = BACKENDS.load(name)()
            num_rows = _oracle_rows(question) if name == ORACLE else question.batch
            make = partial(_subject, question, rows, backend, num_rows)
            subjects[name] = make(is_sparse=False)
            if rows.reading is not None:
                subjects[f"{name}/sparse"] = make(is_sparse=True)
        except (PacklightError, ImportError, OSError) as error:
            skipped[name] = str(error) or type(error).__name__
    return subjects, skipped


def _oracle_rows(question: Question) -> int:
    return min(question.batch, max(1, ORACLE_TOKENS // question.context))


def _subject(question: Question, rows: Rows, backend: AttentionBackend, num_rows: int, *, is_sparse: bool) -> Subject:
    reads = rows.reads(num_rows) if is_sparse else ()
    batch = DecodeBatch(rows.pool, rows.table, rows.rows[:num_rows], reads, rows.summaries if is_sparse else None)
    return Subject(backend.plan(batch), rows.pool.num_layers, _inputs(question).first(num_rows), question.slice_s)


def _timed(
    rows: Rows, subjects: dict[str, Subject], seconds: dict[str, Spread], *, is_sparse: bool
) -> dict[str, Timed]:
    suffix = "/sparse" if is_sparse else ""
    chosen = {name: subject for name, subject in subjects.items() if name.endswith("/sparse") == is_sparse}
    oracle = chosen.get(ORACLE + suffix)
    num_bytes = rows.layer_bytes if is_sparse else partial(dense_bytes, rows)
    return {
        name.removesuffix(suffix): Timed(
            seconds[name], num_bytes(0, subject.num_rows), subject.num_rows, _max_error(subject, oracle)
        )
        for name, subject in chosen.items()
    }


def _max_error(subject: Subject, oracle: Subject | None) -> float | None:
    """The largest difference to the reference, in the rows that it computed."""
    if oracle is None or oracle is subject:
        return None
    num_rows = min(subject.num_rows, oracle.num_rows)
    difference = subject.first_out_BHD[:num_rows].float() - oracle.first_out_BHD[:num_rows].float()
    return float(difference.abs().max())
