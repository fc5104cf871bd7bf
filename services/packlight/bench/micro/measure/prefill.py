"""Prefill attention of one layer, backend by backend: one chunk of a prompt behind tokens that are stored already.

Knows the attention seam. The prompt's blocks are dealt in random order, as a pool's are once it has been used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from packlight.attention.base import PrefillBatch, PrefillChunk
from packlight.attention.registry import BACKENDS
from packlight.bench.micro.measure.attention import Shape
from packlight.bench.timing import Spread, slices_of, take_turns
from packlight.core.errors import PacklightError
from packlight.core.types import ModelSpec
from packlight.kv.pool import KVPool

NUM_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Question:
    """`chunk` new tokens of one prompt at each of `contexts`. `slice_s`: how long a backend is measured in a round."""

    shape: Shape
    dtype: torch.dtype
    page_size: int
    contexts: tuple[int, ...]
    chunk: int
    backends: tuple[str, ...]
    num_threads: int = 1
    num_rounds: int = 5
    slice_s: float = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one context. `seconds` of a layer and the largest difference to the first backend's output, by backend."""

    num_flops: float
    seconds: dict[str, Spread]
    max_error: dict[str, float]
    skipped: dict[str, str]


def measure(question: Question, context: int) -> Answer:
    torch.set_num_threads(question.num_threads)
    batch, inputs = _prompt(question, context)
    outputs: dict[str, Tensor] = {}
    subjects: dict[str, Callable[[], float]] = {}
    skipped: dict[str, str] = {}
    for name in question.backends:
        try:
            attend = _attend(name, batch, inputs)
        except (PacklightError, ImportError, OSError) as error:
            skipped[name] = str(error) or type(error).__name__
            continue
        outputs[name] = attend().float()
        subjects[name] = slices_of(attend, question.slice_s)
    seconds = take_turns(subjects, question.num_rounds)
    first = next(iter(outputs.values()), None)
    errors = {name: float((out - first).abs().max()) for name, out in outputs.items() if first is not None}
    return Answer(num_flops(question.shape, context, question.chunk), seconds, errors, skipped)


def num_flops(shape: Shape, context: int, chunk: int) -> float:
    """Of both products, over the keys that a query sees; what is computed and hidden is not counted."""
    return 4.0 * shape.num_heads * shape.head_dim * (context * chunk + chunk * (chunk + 1) / 2)


def _prompt(question: Question, context: int) -> tuple[PrefillBatch, tuple[Tensor, ...]]:
    """The chunk, and its q, k and v."""
    shape, generator = question.shape, torch.Generator().manual_seed(0)
    num_blocks = -(-(context + question.chunk) // question.page_size)
    spec = ModelSpec(
        name="bench",
        fingerprint="bench",
        num_layers=NUM_LAYERS,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=1,
        max_context=context + question.chunk,
        eos_token_ids=(),
        dtype=str(question.dtype).removeprefix("torch."),
    )
    pool = KVPool(spec, num_blocks=num_blocks, page_size=question.page_size, dtype=question.dtype)
    pool.k.normal_(generator=generator)
    pool.v.normal_(generator=generator)
    blocks = torch.randperm(num_blocks, generator=generator)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    sizes = ((question.chunk, num_heads, shape.head_dim) for num_heads in heads)
    inputs = tuple(torch.randn(size, generator=generator).to(question.dtype) for size in sizes)
    return PrefillBatch(pool, (PrefillChunk(0, question.chunk, context, blocks),)), inputs


def _attend(name: str, batch: PrefillBatch, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """One layer of one backend; each call takes the next layer."""
    plan, layers = BACKENDS.load(name)().plan(batch), cycle(range(batch.pool.num_layers))
    q_THD, k_TKD, v_TKD = inputs

    def attend() -> Tensor:
        with torch.inference_mode():
            layer = next(layers)
            out: Tensor = plan.attend(layer, q_THD, k_TKD, v_TKD, scale=q_THD.shape[-1] ** -0.5, sliding_window=None)
            return out

    return attend
