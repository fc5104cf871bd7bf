"""Steps that all ranks compute: told to the followers, and computed here at the same time.

Whoever uses these runners sees one model and one pool with all KV heads. Legend as in `engine/runner.py`, H query
heads of the rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import LayerHook
from packlight.core.errors import InternalError, WorkerLost
from packlight.engine.parallel.crew import Crew
from packlight.engine.parallel.messages import Kind, Message, prefill_message
from packlight.engine.parallel.pools import GatheredPool, GatheredWindow, ScatteredPool
from packlight.engine.parallel.rank import window_of
from packlight.engine.parallel.tables import TableMirror, TableSender
from packlight.engine.runner import ChunkWork, DecodeRunner, Runner
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable


class ParallelRunner:
    """A `PrefillRunner` over `num_ranks` pools of exact KV, block for block the same but for the heads."""

    def __init__(self, crew: Crew, attention: str, memory_bytes: int) -> None:
        """Raises ConfigError if not one block fits."""
        self._crew = crew
        self._own: Runner = crew.rank.exact(attention, memory_bytes)
        self._number = crew.open_runner(Kind.EXACT_POOL, attention, {"memory_bytes": memory_bytes})
        self.model, self.pool = crew.rank.model, GatheredPool(crew, self._own.pool)
        self.window = GatheredWindow(crew, window_of(self._own))

    def prefill(self, works: Sequence[ChunkWork], on_layer: LayerHook | None = None) -> Tensor:
        """See `Runner.prefill`. What `on_layer` raises is raised after the step: the other ranks have to finish it."""
        relay = Relay(self._crew, on_layer) if on_layer is not None else None
        with self._crew.together():
            self._crew.followers.tell_all(prefill_message(self._number, works, is_watched=relay is not None))
            logits_RV = self._own.prefill(works, relay)
        if relay is not None and relay.failure is not None:
            raise relay.failure
        return logits_RV


class Relay:
    """The layer hook of this rank's step: gathers the queries of all ranks for the hook of the whole."""

    def __init__(self, crew: Crew, on_layer: LayerHook) -> None:
        self._crew, self._on_layer = crew, on_layer
        self.failure: Exception | None = None

    def __call__(self, layer: int, q_THD: Tensor, scale: float) -> None:
        parts = [q_THD]
        parts += [self._crew.group.receive(q_THD.shape, q_THD.dtype, rank) for rank in self._crew.followers.ranks]
        if self.failure is None:
            self._call(layer, torch.cat(parts, dim=1), scale)
        self._crew.followers.tell_all(Message(Kind.RESUME))

    def _call(self, layer: int, q_THD: Tensor, scale: float) -> None:
        try:
            self._on_layer(layer, q_THD, scale)
        except WorkerLost:  # nobody knows what the other rank waits for
            raise
        except Exception as error:
            self.failure = error


class ParallelDecodeRunner(DecodeRunner):
    """A `DecodeRunner` whose pool is divided among the ranks by KV head."""

    pool: ScatteredPool

    def __init__(self, crew: Crew, attention: str, memory_bytes: int, *, num_rows: int) -> None:
        """`num_rows` are those of the table. Raises ConfigError if not one block fits."""
        self._crew = crew
        self._own = crew.rank.packed(attention, memory_bytes)
        numbers = {"memory_bytes": memory_bytes, "num_rows": num_rows}
        self._number = crew.open_runner(Kind.PACKED_POOL, attention, numbers)
        super().__init__(crew.rank.model, ScatteredPool(crew, self._own.pool), self._own.backend)
        self._mirror = mirror_of(self._own, num_rows)
        self._sender = TableSender(
            num_ranks=crew.num_ranks, num_pages=self.pool.num_head_pages, page_size=self.pool.page_size
        )

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
        """See `DecodeRunner.decode`: of dense rows that nobody watches."""
        if on_layer is not None or any(reading is not None for reading in reads):
            raise InternalError("rows of a divided pool are read whole, and not watched")
        updates = self._sender.updates(table, rows)
        step = np.array(token_ids, dtype=np.int64), np.array(positions, dtype=np.int64)
        with self._crew.together():
            self.pool.hand_over(self._number)
            for rank in self._crew.followers.ranks:
                arrays = (*step, *updates[rank].arrays())
                self._crew.followers.tell(rank, Message(Kind.DECODE, {"runner": self._number}, arrays))
            self._mirror.apply(updates[0])
            return self._own.decode(self._mirror, rows, token_ids, positions)


def mirror_of(runner: DecodeRunner, num_rows: int) -> TableMirror:
    """A rank's table, for the heads of its pool."""
    pool = runner.pool
    return TableMirror(
        num_rows=num_rows, num_layers=pool.num_layers, num_kv_heads=pool.num_kv_heads, page_size=pool.page_size
    )
