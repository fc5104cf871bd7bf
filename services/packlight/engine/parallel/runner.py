"""Steps that all ranks compute: told to the followers, and computed here at the same time.

Whoever uses these runners sees one model and one pool with all KV heads. Legend as in `engine/runner.py`, H query
heads of the rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import LayerHook, LayerQueries
from packlight.compress.packers import TorchPacker
from packlight.core.errors import InternalError, WorkerLost
from packlight.engine.parallel.crew import Crew
from packlight.engine.parallel.messages import Kind, Message, prefill_message
from packlight.engine.parallel.pools import GatheredPool, GatheredWindow, ScatteredPool
from packlight.engine.parallel.rank import Rank, window_of
from packlight.engine.parallel.readings import told_readings
from packlight.engine.parallel.share import PackedShare
from packlight.engine.parallel.tables import TableSender
from packlight.engine.runner import ChunkWork, DecodeRunner, Runner
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable


class ParallelRunner:
    """A `PrefillRunner` over `num_ranks` pools of exact KV, block for block the same but for the heads."""

    def __init__(self, crew: Crew, rank: Rank, attention: str, memory_bytes: int) -> None:
        """Raises ConfigError if not one block fits."""
        self._crew = crew
        self._own: Runner = rank.exact(attention, memory_bytes)
        self._number = crew.open_runner(Kind.EXACT_POOL, rank, attention, {"memory_bytes": memory_bytes})
        self.model, self.pool = rank.model, GatheredPool(crew, self._own.pool)
        self.window = GatheredWindow(crew, window_of(self._own))
        self.packer = TorchPacker(self.pool)

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

    def __call__(self, layer: int, queries: LayerQueries) -> None:
        q_THD = self._gathered(queries.q_THD)
        # All ranks have the same backend: either each of them says, or none.
        lse_TH = None if queries.lse_TH is None else self._gathered(queries.lse_TH)
        if self.failure is None:
            self._call(layer, LayerQueries(q_THD, queries.scale, lse_TH))
        self._crew.followers.tell_all(Message(Kind.RESUME))

    def _gathered(self, own: Tensor) -> Tensor:
        """What every rank says of its heads, which are the second dim."""
        group, ranks = self._crew.group, self._crew.followers.ranks
        return torch.cat([own, *(group.receive(own.shape, own.dtype, rank) for rank in ranks)], dim=1)

    def _call(self, layer: int, queries: LayerQueries) -> None:
        try:
            self._on_layer(layer, queries)
        except WorkerLost:  # nobody knows what the other rank waits for
            raise
        except Exception as error:
            self.failure = error


class ParallelDecodeRunner(DecodeRunner):
    """A `DecodeRunner` whose pool is divided among the ranks by KV head."""

    pool: ScatteredPool

    def __init__(self, crew: Crew, rank: Rank, attention: str, memory_bytes: int, *, num_rows: int) -> None:
        """`num_rows` are those of the table. Raises ConfigError if not one block fits."""
        self._crew = crew
        own = rank.packed(attention, memory_bytes)
        numbers = {"memory_bytes": memory_bytes, "num_rows": num_rows}
        self._number = crew.open_runner(Kind.PACKED_POOL, rank, attention, numbers)
        self._share = PackedShare(own, num_rows=num_rows)
        super().__init__(rank.model, ScatteredPool(crew, self._share), own.backend)
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
        """See `DecodeRunner.decode`: of rows that nobody watches. `summaries` are the ranks' own."""
        if on_layer is not None:
            raise InternalError("rows of a divided pool are not watched")
        updates = self._sender.updates(table, rows)
        is_fresh_B = updates[0].is_fresh_B
        told = told_readings(
            reading for reading, fresh in zip(reads or (None,) * len(rows), is_fresh_B, strict=True) if fresh
        )
        step = np.array(token_ids, dtype=np.int64), np.array(positions, dtype=np.int64)
        with self._crew.together():
            self.pool.hand_over(self._number)
            for rank in self._crew.followers.ranks:
                arrays = (*step, *updates[rank].arrays())
                self._crew.followers.tell(rank, Message(Kind.DECODE, {"runner": self._number}, arrays, told))
            return self._share.decode(token_ids, positions, updates[0], told)
