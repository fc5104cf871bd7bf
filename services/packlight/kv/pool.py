"""The KV pool: the tensors behind the pages.

Knows one memory, seen in three ways. Does not know who holds which page (`kv/pages.py`) or why.

Legend: N blocks, L layers, K KV heads, P page size, D head dim, T tokens, S tokens of one sequence, X items of a call.

    k, v          [N, L, K, P, D]   a block is P tokens of every layer and KV head: the unit of exact KV
    head pages    [N*L*K, P, D]     one (block, layer, head): the unit of packed KV; id = (block * L + layer) * K + head
    token slots   [N*L*K*P, D]      slot = head page * P + offset in the page

Keys are stored after RoPE, so a page can be read without knowing where in the prompt its tokens stood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec
from packlight.kv.pages import PageIds

CACHE_LINE_BYTES = 64
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def block_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    return page_size * spec.kv_bytes_per_token(dtype.itemsize)


def blocks_that_fit(spec: ModelSpec, memory_bytes: int, page_size: int, dtype: torch.dtype) -> int:
    """Raises ConfigError if not even one does."""
    each = block_bytes(spec, page_size, dtype)
    if memory_bytes < each:
        raise ConfigError(f"kv_memory_bytes: one block of {page_size} tokens needs {each}, got {memory_bytes}")
    return memory_bytes // each


def zeros_on_first_touch(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros that take no memory on the CPU until they are written, aligned to cache lines.

    `torch.zeros` writes them all: a pool of gigabytes would then cost seconds at start, and memory that no request has
    asked for. numpy asks the system for zeroed pages instead."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + CACHE_LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def store_pages(memory_NPD: Tensor, pages_X: Tensor, given_XPD: Tensor) -> None:
    """`memory_NPD[pages_X] = given_XPD`, both of one dtype.

    Torch does that number by number on a CPU: with words of 8 bytes instead of bf16 it takes a third of the time."""
    given_XE = given_XPD.flatten(1)
    given_XE = given_XE if given_XE.stride(1) == 1 else given_XE.contiguous()
    # A view of wider words must be a whole number of them, and begin at one.
    num_bytes = math.gcd(given_XE.shape[1], given_XE.storage_offset()) * given_XE.itemsize
    word = next(word for word in WORDS if num_bytes % word.itemsize == 0)
    memory_NPD.flatten(1).view(word).index_copy_(0, pages_X, given_XE.view(word))


class Tokens(NamedTuple):
    """Some tokens of one layer where they lie: the i-th of KV head h is row `places[h][i]` of `k_XD` and `v_XD`."""

    k_XD: Tensor
    v_XD: Tensor
    places: tuple[Tensor, ...]


class ExactPool(Protocol):
    """What prefill needs of the memory behind blocks once its steps have filled them."""

    num_blocks: int
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def read_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        """One layer's K `[K, S, D]` of the first `num_tokens` tokens of a block list, copied."""
        ...

    def tokens(self, layer: int, blocks: Tensor, indices: Sequence[Tensor]) -> Tokens:
        """The tokens `indices[h]` (int64) of each KV head h of a block list: what is not asked for is not read."""
        ...


class PackedPool(Protocol):
    """What decoding needs of the memory behind head pages: they are written whole or token by token, and read whole.

    Head pages and token slots are int64 indices on the pool's device, X of them in a call. Where there are shards, the
    KV heads are divided among them in order, and so are the pages: a head's pages are its own shard's."""

    num_shards: int
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_head_pages(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    def write_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        """Store head pages, whatever they held before. Page i holds the first `num_tokens_X[i]` tokens, 1 to P (without
        that argument: P); what comes after them is stored as it is."""
        ...

    def append(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        """Store one token at each slot, no two in the same page: behind the page's last token, or over a stored one."""
        ...

    def gather(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        """Copy head pages into contiguous `k_XPD` and `v_XPD` of the pool's dtype. A page that was never written, or
        the unused end of one, reads as something finite."""
        ...

    def release(self, pages: PageIds) -> None:
        """The pages went back to the books. Every page does before it is used anew."""
        ...


class KVPool:
    """Memory for `num_blocks` blocks, K and V apart, zeroed once (a page's unused tail must stay finite)."""

    num_shards = 1

    def __init__(
        self, spec: ModelSpec, *, num_blocks: int, page_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.num_blocks, self.page_size, self.dtype = num_blocks, page_size, dtype
        self.num_layers, self.num_kv_heads, self.head_dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        self.device = torch.device(device)
        shape = (num_blocks, self.num_layers, self.num_kv_heads, page_size, self.head_dim)
        self.k = zeros_on_first_touch(shape, dtype, device)
        self.v = zeros_on_first_touch(shape, dtype, device)
        self.k_pages = self.k.view(-1, page_size, self.head_dim)
        self.v_pages = self.v.view(-1, page_size, self.head_dim)
        self.k_slots = self.k.view(-1, self.head_dim)
        self.v_slots = self.v.view(-1, self.head_dim)

    @classmethod
    def of_size(
        cls, spec: ModelSpec, *, memory_bytes: int, page_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> KVPool:
        """As many blocks as fit into `memory_bytes`. Raises ConfigError if not even one does."""
        num_blocks = blocks_that_fit(spec, memory_bytes, page_size, dtype)
        return cls(spec, num_blocks=num_blocks, page_size=page_size, dtype=dtype, device=device)

    @property
    def num_head_pages(self) -> int:
        return self.num_blocks * self.num_layers * self.num_kv_heads

    @property
    def head_page_bytes(self) -> int:
        """Of K and V together."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        return self.num_head_pages * self.head_page_bytes

    def write_blocks(self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store one layer's K and V of T tokens at (block, offset in the block)."""
        self.k[blocks_T, layer, :, offsets_T] = k_TKD
        self.v[blocks_T, layer, :, offsets_T] = v_TKD

    def read_blocks(self, layer: int, blocks: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """One layer's K and V of the first `num_tokens` tokens of a block list, each `[K, S, D]`, copied."""
        return self._read(self.k, layer, blocks, num_tokens), self._read(self.v, layer, blocks, num_tokens)

    def read_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        return self._read(self.k, layer, blocks, num_tokens)

    def tokens(self, layer: int, blocks: Tensor, indices: Sequence[Tensor]) -> Tokens:
        slots_X = self.token_slots(blocks).index_select(0, torch.cat(list(indices)))
        of_heads = enumerate(torch.split(slots_X, [len(index_X) for index_X in indices]))
        places = tuple(slots_X + self.slots_before(layer, head) for head, slots_X in of_heads)
        return Tokens(self.k_slots, self.v_slots, places)

    def token_slots(self, blocks: Tensor) -> Tensor:
        """Where the tokens of a block list lie in the first layer and head, int64; elsewhere `slots_before` further."""
        slots_per_block = self.num_layers * self.num_kv_heads * self.page_size
        offsets_P = torch.arange(self.page_size, device=self.device)
        return (blocks[:, None] * slots_per_block + offsets_P).flatten()

    def slots_before(self, layer: int, head: int) -> int:
        """Slots of a block that lie before those of (layer, head)."""
        return (layer * self.num_kv_heads + head) * self.page_size

    def _read(self, memory: Tensor, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        pages_KNPD = memory.new_empty((self.num_kv_heads, len(blocks), self.page_size, self.head_dim))
        for head, pages_NPD in enumerate(pages_KNPD):
            # Head by head, straight to where it belongs: gathering whole blocks and turning them takes 5 times as long.
            torch.index_select(memory[:, layer, head], 0, blocks, out=pages_NPD)
        return pages_KNPD.flatten(1, 2)[:, :num_tokens]

    def write_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        store_pages(self.k_pages, pages_X, k_XPD)
        store_pages(self.v_pages, pages_X, v_XPD)

    def append(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        self.k_slots.index_copy_(0, slots_X, k_XD)
        self.v_slots.index_copy_(0, slots_X, v_XD)

    def gather(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        torch.index_select(self.k_pages, 0, pages_X, out=k_XPD)
        torch.index_select(self.v_pages, 0, pages_X, out=v_XPD)

    def release(self, pages: PageIds) -> None:
        """Nothing to do: a head page's memory is its own, and is written before it is read."""
