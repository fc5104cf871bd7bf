"""Pages that lie elsewhere: what is kept for the other ranks until a step, and no longer than somebody needs it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from packlight.core.types import ModelSpec
from packlight.engine.parallel.messages import Kind
from packlight.engine.parallel.pools import ScatteredPool
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries

SPEC = ModelSpec("m", "f", 2, 1, 8, 100, 512, (0,), "float32")  # one KV head on each of two ranks
PAGE, NUM_BLOCKS = 4, 8
SIZE = NUM_BLOCKS * SPEC.num_layers


class Told:
    """The other ranks: what they were told, and the keys and values that they got."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, Kind, list[int]]] = []
        self.tensors: list[torch.Tensor] = []

    def tell(self, rank, message) -> None:
        self.messages.append((rank, message.kind, message.arrays[0].tolist()))

    def send(self, tensor, rank) -> None:
        self.tensors.append(tensor)


def scattered() -> tuple[ScatteredPool, Told]:
    own = KVPool(SPEC, num_blocks=NUM_BLOCKS, page_size=PAGE, dtype=torch.float32)
    told = Told()
    crew = SimpleNamespace(num_ranks=2, followers=told, group=told)
    share = SimpleNamespace(pool=own, summaries=PageSummaries(SIZE, SPEC.head_dim, torch.float32))
    return ScatteredPool(crew, share), told


def arrive(pool: ScatteredPool, pages: list[int]) -> None:
    """A layer of some request, summarised."""
    pages_X, full_X = torch.tensor(pages), torch.full((len(pages),), PAGE)
    k_XPD = pages_X[:, None, None].float().expand(-1, PAGE, SPEC.head_dim)
    pool.write_pages(pages_X, k_XPD, k_XPD, full_X)
    pool.summaries.build(pages_X, k_XPD, full_X)


def test_what_arrived_is_handed_over_in_order():
    pool, told = scattered()
    arrive(pool, [0, 1, SIZE, SIZE + 3])
    arrive(pool, [2, SIZE + 5])
    pool.hand_over(0)
    assert told.messages == [
        (1, Kind.STORE, [0, 3]),
        (1, Kind.SUMMARISE, [0, 3]),
        (1, Kind.STORE, [5]),
        (1, Kind.SUMMARISE, [5]),
    ]
    assert [tensor[:, 0, 0].tolist() for tensor in told.tensors] == [[SIZE, SIZE + 3]] * 2 + [[SIZE + 5]] * 2


def test_answers_that_end_without_a_step_leave_nothing_to_hand_over():
    pool, told = scattered()
    arrive(pool, [2, SIZE + 5])
    for _ in range(10):
        arrive(pool, [0, SIZE])
        arrive(pool, [1, SIZE + 3])
        pool.release(np.array([0, 1, SIZE, SIZE + 3], dtype=np.int32))
    assert len(pool._due) == 2
    pool.hand_over(0)
    assert [pages for _, _, pages in told.messages] == [[5], [5]]
