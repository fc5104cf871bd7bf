"""The KV of all ranks, as the first process sees it: one pool with all heads, most of which lie elsewhere.

Exact KV is asked for from within a step, layer by layer, where the followers wait to be asked. Packed KV is handed over
before a step: layers arrive at any time, and are kept here until then.

Legend: K KV heads, H query heads, S tokens, X tokens or pages, P page size, D head dim, W window rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from packlight.compress.window import StoredWindow, WindowAttention
from packlight.core.errors import InternalError
from packlight.engine.parallel.crew import Crew
from packlight.engine.parallel.messages import Kind, Message
from packlight.engine.parallel.share import PackedShare
from packlight.engine.parallel.tables import head_slices
from packlight.kv.pages import PageIds
from packlight.kv.pool import KVPool, Tokens
from packlight.kv.summaries import PageSummaries


class GatheredPool:
    """An `ExactPool` of all heads. Only to be read in the layer hook of a step: what is read travels."""

    def __init__(self, crew: Crew, own: KVPool) -> None:
        self._crew, self._own = crew, own
        self.num_blocks, self.page_size = own.num_blocks, own.page_size
        self.num_layers, self.num_kv_heads = own.num_layers, own.num_kv_heads * crew.num_ranks
        self.head_dim, self.dtype, self.device = own.head_dim, own.dtype, own.device

    def read_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        numbers = {"layer": layer, "num_tokens": num_tokens}
        self._crew.followers.tell_all(Message(Kind.KEYS, numbers, [blocks.cpu().numpy()]))
        parts = [self._own.read_keys(layer, blocks, num_tokens)]
        for rank in self._crew.followers.ranks:
            parts.append(self._crew.group.receive(parts[0].shape, self.dtype, rank))
        return torch.cat(parts)

    def tokens(self, layer: int, blocks: Tensor, indices: Sequence[Tensor]) -> Tokens:
        """Those of other ranks are packed there: no more than what was selected travels."""
        heads = head_slices(self.num_kv_heads, self._crew.num_ranks)
        for rank in self._crew.followers.ranks:
            numbers = {"layer": layer}
            numbers |= {f"tokens_{head}": len(index_X) for head, index_X in enumerate(indices[heads[rank]])}
            self._crew.followers.tell(rank, Message(Kind.TOKENS, numbers, [blocks.cpu().numpy()]))
            self._crew.group.send(torch.cat(list(indices[heads[rank]])), rank)
        parts = [packed_tokens(self._own, layer, blocks, indices[heads[0]])]
        for rank in self._crew.followers.ranks:
            num_tokens = sum(len(index_X) for index_X in indices[heads[rank]])
            parts.append(self._crew.group.receive((2, num_tokens, self.head_dim), self.dtype, rank))
        k_XD, v_XD = torch.cat(parts, dim=1)
        places = torch.split(torch.arange(len(k_XD), device=self.device), [len(index_X) for index_X in indices])
        return Tokens(k_XD, v_XD, tuple(places))


class GatheredWindow:
    """The window's attention of all heads: every rank works out its own, and no key travels."""

    def __init__(self, crew: Crew, own: StoredWindow) -> None:
        self._crew, self._own = crew, own

    def attend(
        self, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor | None = None
    ) -> WindowAttention:
        q_WhD = q_WHD.chunk(self._crew.num_ranks, dim=1)
        lse_Wh = [None] * self._crew.num_ranks if lse_WH is None else lse_WH.chunk(self._crew.num_ranks, dim=1)
        numbers = {"layer": layer, "num_tokens": num_tokens, "num_rows": len(q_WHD)}
        numbers |= {"lse_is_known": int(lse_WH is not None)}
        message = Message(Kind.WINDOW, numbers, [blocks.cpu().numpy()])
        for rank in self._crew.followers.ranks:
            self._crew.followers.tell(rank, message)
            self._crew.group.send(q_WhD[rank], rank)
            if (known := lse_Wh[rank]) is not None:
                self._crew.group.send(known, rank)
        parts = [self._own.attend(layer, q_WhD[0], blocks, num_tokens, scale, lse_Wh[0])]
        for rank in self._crew.followers.ranks:
            shapes = (parts[0].mass_KS.shape, parts[0].lse_WH.shape)
            mass_KS, found = (self._crew.group.receive(shape, torch.float32, rank) for shape in shapes)
            parts.append(WindowAttention(mass_KS, found))
        return WindowAttention(torch.cat([part.mass_KS for part in parts]), torch.cat([p.lse_WH for p in parts], dim=1))


@dataclass(frozen=True, eq=False, slots=True)
class _Due:
    """What a rank has to be told before its next step: integers over its pipe, tensors over the group."""

    rank: int
    kind: Kind
    arrays: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...] = ()


class ScatteredPool:
    """A `PackedPool` of all heads, with a share of the pages on each rank. Pages are written from any thread; steps are
    computed on the ranks' own pools."""

    def __init__(self, crew: Crew, share: PackedShare) -> None:
        own = share.pool
        self._crew, self._own = crew, own
        self.num_shards, self.page_size = crew.num_ranks, own.page_size
        self.num_layers, self.num_kv_heads = own.num_layers, own.num_kv_heads * crew.num_ranks
        self.head_dim, self.dtype, self.device = own.head_dim, own.dtype, own.device
        self._due: deque[_Due] = deque()
        self._due_lock = Lock()
        self.summaries = ScatteredSummaries(self, share.summaries)

    @property
    def num_head_pages(self) -> int:
        return self._own.num_head_pages * self.num_shards

    @property
    def memory_bytes(self) -> int:
        return self._own.memory_bytes * self.num_shards

    def write_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        """Each to its rank, at `hand_over` if that is another."""
        for rank, (is_there_X, own_pages_X) in enumerate(self.by_rank(pages_X)):
            k_part, v_part = k_XPD[is_there_X], v_XPD[is_there_X]
            if rank == 0:
                num_tokens = None if num_tokens_X is None else num_tokens_X[is_there_X]
                self._own.write_pages(own_pages_X, k_part, v_part, num_tokens)
            else:
                self.tell(rank, Kind.STORE, (own_pages_X,), (k_part, v_part))

    def by_rank(self, pages_X: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(which of `pages_X` are the rank's, bool `[X]`; their numbers there), rank by rank."""
        size = self._own.num_head_pages
        parts = []
        for rank in range(self.num_shards):
            is_there_X = pages_X // size == rank
            parts.append((is_there_X, pages_X[is_there_X] - rank * size))
        return parts

    def tell(self, rank: int, kind: Kind, arrays: tuple[Tensor, ...], tensors: tuple[Tensor, ...] = ()) -> None:
        """At `hand_over`; the first of `arrays` says of which pages, and is not empty if anything is said."""
        if len(arrays[0]):
            with self._due_lock:
                self._due.append(_Due(rank, kind, arrays, tensors))

    def hand_over(self, runner: int) -> None:
        """Between two steps: what was written goes to its ranks, in the order in which it came."""
        while (due := self._next_due()) is not None:
            arrays = [array.cpu().numpy() for array in due.arrays]
            self._crew.followers.tell(due.rank, Message(due.kind, {"runner": runner}, arrays))
            for tensor in due.tensors:
                self._crew.group.send(tensor, due.rank)

    def append(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        raise InternalError("a token is stored by the rank that has its head")

    def gather(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        raise InternalError("pages are read by the rank that has their heads")

    def release(self, pages: PageIds) -> None:
        """What is still due for them never goes: answers of one token end without a step, and no step may ever come."""
        is_gone_N = np.zeros(self.num_head_pages, dtype=np.bool_)
        is_gone_N[pages] = True
        with self._due_lock:
            self._due = deque(due for due in self._due if not is_gone_N[self._first_page(due)])

    def _first_page(self, due: _Due) -> int:
        """All are of one request."""
        return int(due.arrays[0][0]) + due.rank * self._own.num_head_pages

    def _next_due(self) -> _Due | None:
        with self._due_lock:
            return self._due.popleft() if self._due else None


class ScatteredSummaries:
    """A `SummaryWriter` of all heads. Summaries of pages elsewhere are made there, of the keys that were handed over
    before: nothing but numbers of pages travels."""

    def __init__(self, pool: ScatteredPool, own: PageSummaries) -> None:
        self._pool, self._own = pool, own

    def build(self, pages_X: Tensor, k_XPD: Tensor, num_tokens_X: Tensor) -> None:
        for rank, (is_there_X, own_pages_X) in enumerate(self._pool.by_rank(pages_X)):
            if rank == 0:
                self._own.build(own_pages_X, k_XPD[is_there_X], num_tokens_X[is_there_X])
            else:
                self._pool.tell(rank, Kind.SUMMARISE, (own_pages_X, num_tokens_X[is_there_X]))


def packed_tokens(pool: KVPool, layer: int, blocks: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """K and V of some tokens of each head of `pool`, `[2, X, D]`, head by head."""
    k_XD, v_XD, places = pool.tokens(layer, blocks, indices)
    place_X = torch.cat(list(places))
    return torch.stack([k_XD.index_select(0, place_X), v_XD.index_select(0, place_X)])
