"""Decode steps captured once and replayed: without Python and without a launch per kernel.

Knows capture, its buffers and its memory. Which step is replayed is decided in `graph_choice.py`; what stays in place
inside attention is `FixedPlan`'s. The capturing itself is behind `GraphEngine`: CUDA's here, and in tests one that
records torch's operations and runs them again on the same memory.

Legend: B rows of the captured step, R rows of the step, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, FixedBackend, FixedPlan, FixedShape, LayerHook
from packlight.core.config import GraphsConfig
from packlight.engine.graph_choice import Mode, choose_shape, pad_rows
from packlight.engine.runner import DecodeRunner, computing
from packlight.kv.pages import OutOfPages
from packlight.kv.pool import PackedPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable
from packlight.models.base import LanguageModel

log = logging.getLogger(__name__)
Replay = Callable[[], Tensor]


class GraphEngine(Protocol):
    def capture(self, step: Callable[[], Tensor]) -> Replay:
        """`step` has run before. Raises RuntimeError if it cannot be captured. What a replay returns is valid until the
        next replay of anything captured by this engine."""
        ...

    def used_bytes(self) -> int:
        """Device memory in use now, of which captures keep a share."""
        ...


class CudaGraphs:
    """All captures share one memory pool: never are two of them replayed at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Threads that transfer or prefill meanwhile are no part of it, and must not break it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def used_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


class CapturedStep:
    """One shape: its buffers, its plan, and the replay."""

    def __init__(self, shape: FixedShape, plan: FixedPlan, device: torch.device) -> None:
        self._shape, self._plan = shape, plan
        self._tokens_B, self._positions_B = (
            torch.zeros(shape.num_rows, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._every_row_B = torch.arange(shape.num_rows, device=device)
        self._replay: Replay | None = None

    def capture(self, model: LanguageModel, engine: GraphEngine, batch: DecodeBatch) -> None:
        """`batch` fits the shape; its new tokens are written, and mean nothing."""
        self._plan.load(batch)

        def step() -> Tensor:
            return model.forward(self._tokens_B, self._positions_B, self._plan, self._every_row_B)

        for _ in range(2):  # kernels are compiled and chosen, the plan learns its layers
            step()
        self._plan.load(batch)
        self._replay = engine.capture(step)

    def run(self, batch: DecodeBatch, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
        """Logits `[B, V]`, valid until the next replay."""
        assert self._replay is not None, "run before capture"
        self._plan.load(batch)
        self._tokens_B.copy_(tokens_B, non_blocking=True)
        self._positions_B.copy_(positions_B, non_blocking=True)
        return self._replay()


class GraphedRunner(DecodeRunner):
    """A runner that replays the steps it has captured. `on_mode` is told how each step ran."""

    def __init__(
        self,
        model: LanguageModel,
        pool: PackedPool,
        backend: FixedBackend,
        engine: GraphEngine,
        *,
        sizes: GraphsConfig,
    ) -> None:
        """`sizes` says what is captured, in every combination."""
        super().__init__(model, pool, backend)
        self._fixed_backend, self._engine = backend, engine
        self._sizes = sizes
        self._captured: dict[FixedShape, CapturedStep] = {}
        self.on_mode: Callable[[Mode], None] = lambda mode: None

    def prepare(
        self,
        table: HeadPageTable,
        summaries: PageSummaries,
        readings: Sequence[Reading] = (),
        *,
        on_progress: Callable[[str], None],
    ) -> None:
        """Capture all shapes, for dense steps and for each of `readings`, with rows of `table`, which has room and is
        given back. A model that cannot be captured runs eagerly, which is logged."""
        started, before = time.perf_counter(), self._engine.used_bytes()
        longest = -(-self.model.spec.max_context // self.pool.page_size)
        shapes = self._shapes(table.num_free_rows, longest, readings)
        try:
            with computing(self.pool.device):
                self._fixed_backend.reserve(table, self.pool, longest)
                for done, shape in enumerate(shapes):
                    on_progress(f"capturing decode steps: {done} of {len(shapes)}")
                    self._capture(shape, table, summaries)
        except (RuntimeError, OutOfPages) as error:
            log.warning("decode steps run without graphs, which is slower: %s", error)
            self._captured.clear()
            return
        used_mib, took_s = (self._engine.used_bytes() - before) / 2**20, time.perf_counter() - started
        on_progress(f"captured {len(shapes)} decode steps in {took_s:.1f} s, {used_mib:.0f} MiB")

    def decode(
        self,
        table: HeadPageTable,
        rows: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        *,
        reads: Sequence[Reading | None] = (),
        summaries: PageSummaries | None = None,
        on_layer: LayerHook | None = None,
    ) -> Tensor:
        chosen = self._choose(table, rows, reads, on_layer)
        if isinstance(chosen, Mode):
            self.on_mode(chosen)
            return super().decode(
                table, rows, token_ids, positions, reads=reads, summaries=summaries, on_layer=on_layer
            )
        self.on_mode(Mode.REPLAYED)
        num_pages_B = (-(-table.new_lengths(list(rows)) // self.pool.page_size)).sum(axis=(1, 2)).tolist()
        places = pad_rows(rows, num_pages_B, chosen.num_rows)
        batch = self._batch(table, [rows[place] for place in places], chosen, summaries, reads, places)
        tokens_B, positions_B = (self._ids([values[place] for place in places]) for values in (token_ids, positions))
        with computing(self.pool.device):
            return self._captured[chosen].run(batch, tokens_B, positions_B)[: len(rows)]

    def _shapes(self, max_rows: int, max_pages: int, readings: Sequence[Reading]) -> list[FixedShape]:
        """The largest first: the smaller ones then find the memory they need."""
        batch_sizes = {min(size, max_rows) for size in self._sizes.batch_sizes}
        num_pages = {min(-(-tokens // self.pool.page_size), max_pages) for tokens in self._sizes.tokens}
        # Recipes that read some pages keep as much in each layer; others may not.
        ways = [(None, True), (None, False), *((reading, True) for reading in readings)]
        every = product(sorted(batch_sizes, reverse=True), sorted(num_pages, reverse=True), ways)
        return [FixedShape(size, pages, *way) for size, pages, way in every]

    def _choose(
        self,
        table: HeadPageTable,
        rows: Sequence[int],
        reads: Sequence[Reading | None],
        on_layer: LayerHook | None,
    ) -> FixedShape | Mode:
        if not self._captured:
            return Mode.NO_GRAPHS
        if on_layer is not None:
            return Mode.WATCHED
        lengths_BLK, windows = table.new_lengths(list(rows)), self.model.spec.sliding_windows
        return choose_shape(self._captured, lengths_BLK, self.pool.page_size, reads, windows)

    def _batch(
        self,
        table: HeadPageTable,
        rows: Sequence[int],
        shape: FixedShape,
        summaries: PageSummaries | None,
        reads: Sequence[Reading | None],
        places: Sequence[int],
    ) -> DecodeBatch:
        """Every row of a sparse shape has a reading, if only one that reads all it has."""
        padded: tuple[Reading | None, ...] = ()
        if shape.reading is not None:
            padded = tuple(reads[place] or shape.reading for place in places)
        return DecodeBatch(self.pool, table, tuple(rows), padded, summaries)

    def _capture(self, shape: FixedShape, table: HeadPageTable, summaries: PageSummaries) -> None:
        """On rows with one token in every head."""
        rows = [table.open() for _ in range(shape.num_rows)]
        try:
            for row in rows:
                for layer in range(self.pool.num_layers):
                    table.fill_layer(row, layer, [1] * self.pool.num_kv_heads)
            table.grow(rows)
            batch = self._batch(table, rows, shape, summaries, [None] * len(rows), range(len(rows)))
            captured = CapturedStep(shape, self._fixed_backend.fixed_plan(batch, shape), self.pool.device)
            captured.capture(self.model, self._engine, batch)
            self._captured[shape] = captured
        finally:
            for row in rows:
                self.pool.release(table.held(row))
                table.close(row)
