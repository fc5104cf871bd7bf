"""One exact prefill of a prompt, with all that selections will ask of it: every variant shares it.

Knows the runner and its pool. Knows no recipe by name, no task and no measure.

Shapes: L layers, T tokens of a chunk, W window rows, S prompt tokens, H query heads, K KV heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packlight.attention.base import LayerQueries
from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import LayerView
from packlight.core.errors import RequestNeverFits
from packlight.core.types import ModelSpec
from packlight.engine.runner import ChunkWork, Runner
from packlight.kv.pages import PageBook, PageIds
from packlight.kv.pool import KVPool

Clock = Callable[[], float]


@dataclass(slots=True)
class Anchor:
    """What was seen of the prompt's first `num_tokens`, where a selection may be anchored.

    windows: per layer, the queries [W, H, D] of its last W tokens. accumulated: the sums of all its queries, if they
    were asked for, which took `accumulate_s`."""

    num_tokens: int
    windows: list[list[Tensor]]
    accumulated: AccumulatedMass | None = None
    accumulate_s: float = 0.0

    def window(self, layer: int, num_rows: int) -> Tensor:
        """The last `num_rows`, or all rows of a shorter prompt."""
        return torch.cat(self.windows[layer])[-num_rows:]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A selection will be anchored behind `num_tokens`; `all_queries` if a recipe needs those of every token."""

    num_tokens: int
    all_queries: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class ExactPrompt:
    """The exact KV of `token_ids`, in `blocks` of `pool`. `logits_V` predict the token after the last one.

    `prefill_s` is the time of the prefill alone, without what `anchors` took."""

    token_ids: tuple[int, ...]
    spec: ModelSpec
    pool: KVPool
    blocks: PageIds
    anchors: tuple[Anchor, ...]
    scale: float
    logits_V: Tensor
    prefill_s: float

    def read(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [K, S, D] of the first `num_tokens`."""
        return self.pool.read_blocks(layer, torch.from_numpy(self.blocks).long().to(self.pool.device), num_tokens)

    def view(self, anchor: Anchor, layer: int, k_KSD: Tensor, window: int) -> LayerView:
        return LayerView(
            q_WHD=anchor.window(layer, window),
            k_KSD=k_KSD,
            scale=self.scale,
            layer=layer,
            num_layers=self.spec.num_layers,
            accumulated_KS=None if anchor.accumulated is None else anchor.accumulated.layer(layer),
        )


class Prefiller:
    """Prefills one prompt at a time, in chunks, into a pool of its own."""

    def __init__(self, runner: Runner, *, chunk_tokens: int, clock: Clock) -> None:
        self._runner, self._chunk_tokens, self._clock = runner, chunk_tokens, clock
        self._book = PageBook(runner.pool.num_blocks)

    def run(self, token_ids: Sequence[int], wanted: Sequence[Wanted], window: int) -> ExactPrompt:
        """Hold on to the result until `release`. `window` is the widest that any selection will look through.

        Raises RequestNeverFits when the pool is too small."""
        runner, num_tokens = self._runner, len(token_ids)
        blocks = self._allocate(num_tokens)
        recorder = _Recorder(runner, blocks, wanted, window, self._clock)
        started = self._clock()
        logits_RV = torch.empty(0)
        for start in range(0, num_tokens, self._chunk_tokens):
            chunk = token_ids[start : start + self._chunk_tokens]
            recorder.start, recorder.end = start, start + len(chunk)
            work = ChunkWork(chunk, start, blocks, wants_logits=recorder.end == num_tokens)
            logits_RV = runner.prefill([work], recorder)
        return ExactPrompt(
            token_ids=tuple(token_ids),
            spec=runner.model.spec,
            pool=runner.pool,
            blocks=blocks,
            anchors=tuple(recorder.anchors),
            scale=recorder.scale,
            logits_V=logits_RV[0],
            prefill_s=self._clock() - started - recorder.seconds,
        )

    def release(self, prompt: ExactPrompt) -> None:
        self._book.release(prompt.blocks)

    def _allocate(self, num_tokens: int) -> PageIds:
        num_blocks = -(-num_tokens // self._runner.pool.page_size)
        if num_blocks > self._book.num_free:
            raise RequestNeverFits(
                f"a prompt of {num_tokens} tokens needs {num_blocks} KV blocks, the pool has {self._book.num_pages}: "
                "ask for shorter prompts or raise prefill.kv_memory_bytes"
            )
        return self._book.allocate(num_blocks)


@dataclass(slots=True)
class _Recorder:
    """The layer hook of the prefill: keeps queries, and sums up attention, while chunk `start : end` is computed."""

    runner: Runner
    blocks: PageIds
    wanted: Sequence[Wanted]
    window: int
    clock: Clock
    start: int = 0
    end: int = 0
    scale: float = 1.0
    seconds: float = 0.0
    anchors: list[Anchor] = field(init=False)

    def __post_init__(self) -> None:
        self.anchors = [self._anchor(each) for each in self.wanted]

    def __call__(self, layer: int, queries: LayerQueries) -> None:
        started, q_THD = self.clock(), queries.q_THD
        self.scale = queries.scale
        for anchor in self.anchors:
            first, last = max(self.start, anchor.num_tokens - self.window), min(self.end, anchor.num_tokens)
            if first < last:
                anchor.windows[layer].append(q_THD[first - self.start : last - self.start].clone())
            if anchor.accumulated is not None and self.start < anchor.num_tokens:
                self._accumulate(anchor, anchor.accumulated, layer, q_THD[: last - self.start])
        self.seconds += self.clock() - started

    def _accumulate(self, anchor: Anchor, accumulated: AccumulatedMass, layer: int, q_RHD: Tensor) -> None:
        started = self.clock()
        pool = self.runner.pool
        blocks = torch.from_numpy(self.blocks).long().to(pool.device)
        k_KSD = pool.read_keys(layer, blocks, self.start + len(q_RHD))
        accumulated.add(layer, q_RHD, k_KSD, self.scale)
        anchor.accumulate_s += self.clock() - started

    def _anchor(self, wanted: Wanted) -> Anchor:
        spec, device = self.runner.model.spec, self.runner.pool.device
        windows: list[list[Tensor]] = [[] for _ in range(spec.num_layers)]
        if not wanted.all_queries:
            return Anchor(wanted.num_tokens, windows)
        sums = AccumulatedMass(spec.num_layers, spec.num_kv_heads, wanted.num_tokens, device)
        return Anchor(wanted.num_tokens, windows, sums)
