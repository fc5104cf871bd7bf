"""One decode step, on the compute thread: the newest token of each request is stored, and the next one drawn.

Knows what a batch of tasks means to the runner. Does not know how they came here or where their tokens go.

Legend: T requests of the step, B of them evict, L layers, H query heads, K KV heads, D head dim, M pages per head,
X = M * P slots, P page size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import LayerQueries
from packlight.compress.evict import HeavyHitters, replay
from packlight.core.errors import PacklightError
from packlight.core.types import Token
from packlight.decode.memory import DecodeMemory, Holding
from packlight.decode.task import Task
from packlight.engine.runner import DecodeRunner
from packlight.engine.sampler import SampleRow, sample


def run_step(runner: DecodeRunner, memory: DecodeMemory, batch: Sequence[Task]) -> list[Token | PacklightError]:
    """Room was made by `memory.grow`. A request whose distribution is not finite gets an error, the others a token."""
    holdings = [task.holding for task in batch]
    logits = runner.decode(
        memory.table,
        [holding.row for holding in holdings],
        [task.generated[-1] for task in batch],
        [task.next_position for task in batch],
        reads=tuple(holding.reading for holding in holdings),
        summaries=memory.summaries,
        on_layer=MassWatch.of(memory, holdings),
    )
    return sample(logits, [_sample_row(task) for task in batch])


def _sample_row(task: Task) -> SampleRow:
    request = task.request
    return SampleRow(
        params=request.sampling,
        position=task.next_position + 1,
        penalties=task.penalties,
        banned_token_ids=request.stop.banned(task.num_generated),
        constraint=task.constraint,
    )


class MassWatch:
    """The layer hook of one step: what each query looks at is added up for the requests that evict."""

    def __init__(self, memory: DecodeMemory, places: Sequence[int], hitters: Sequence[HeavyHitters], rows: list[int]):
        """`places[i]` is the place in the batch of the request in `rows[i]`, whose tokens are `hitters[i]`."""
        self._pool, self._places, self._hitters = memory.pool, list(places), hitters
        table, page_size = memory.table, memory.pool.page_size
        lengths_BLK = table.new_lengths(rows)
        num_columns = -(-int(lengths_BLK.max()) // page_size)
        pages_BLKM = table.pages[rows][..., :num_columns].astype(np.int64)
        self._lengths_BLK = torch.from_numpy(lengths_BLK).to(self._pool.device)
        self._pages_BLKM = torch.from_numpy(pages_BLKM).to(self._pool.device)
        self._k, self._v = (self._scratch() for _ in range(2))

    @classmethod
    def of(cls, memory: DecodeMemory, holdings: Sequence[Holding]) -> MassWatch | None:
        """None if nobody evicts: nothing is read twice then."""
        found = [(place, held.hitters, held.row) for place, held in enumerate(holdings) if held.hitters is not None]
        if not found:
            return None
        places, hitters, rows = zip(*found, strict=True)
        return cls(memory, places, hitters, list(rows))

    def __call__(self, layer: int, queries: LayerQueries) -> None:
        if not self._hitters[0].watches(layer):  # the same layers for all: those without a sliding window
            return
        pages_BKM = self._pages_BLKM[:, layer]
        self._pool.gather(pages_BKM.flatten(), self._k, self._v)
        k_BKXD = self._k.view(*pages_BKM.shape[:2], -1, self._pool.head_dim)
        weights_BKX = replay(queries.q_THD[self._places], k_BKXD, self._lengths_BLK[:, layer], queries.scale)
        for hitters, weights_KX in zip(self._hitters, weights_BKX, strict=True):
            hitters.add(layer, weights_KX)

    def _scratch(self) -> Tensor:
        """[B * K * M, P, D], for every layer anew."""
        num_pages = self._pages_BLKM[:, 0].numel()
        shape = (num_pages, self._pool.page_size, self._pool.head_dim)
        return torch.empty(shape, dtype=self._pool.dtype, device=self._pool.device)
