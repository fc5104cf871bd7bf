"""Packing straight out of a pool: kept tokens are read where they lie, and what is dropped is not read.

Knows an exact pool and a selection. Does not know how tokens were chosen, nor where the pages go. Both ways write what
`pack.pack` writes of the same tokens, byte for byte. Legend as in `pack.py`.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from packlight.compress.base import Selection
from packlight.compress.layout import total_pages
from packlight.compress.pack import PackedLayer, gather_pages
from packlight.kv.lending import Lending
from packlight.kv.pool import ExactPool, KVPool
from packlight.native.library import Library
from packlight.native.pack import PackArgs, pack_pages

KEPT_BYTES = 128 << 20
"""Of pages that were sent, kept for the next layers: some layers of a long prompt, or a few prompts of short ones."""


class Packer(Protocol):
    """Over one pool, called from one thread."""

    def pack(self, layer: int, blocks: Tensor, selection: Selection) -> PackedLayer:
        """The selected tokens of one layer of a block list, int64 on the pool's device."""
        ...


class TorchPacker:
    """On any device, over any pool."""

    def __init__(self, pool: ExactPool) -> None:
        self._pool = pool

    def pack(self, layer: int, blocks: Tensor, selection: Selection) -> PackedLayer:
        return gather_pages(*self._pool.tokens(layer, blocks, selection.indices), self._pool.page_size)


class NativePacker:
    """On a CPU: one call per layer, into memory that earlier layers were sent from."""

    def __init__(self, pool: KVPool, library: Library) -> None:
        assert pool.device.type == "cpu", pool.device
        self._pool, self._library, self._memory = pool, library, Lending(KEPT_BYTES)

    def pack(self, layer: int, blocks: Tensor, selection: Selection) -> PackedLayer:
        pool, lengths = self._pool, tuple(selection.lengths())
        shape = (total_pages(lengths, pool.page_size), 2, pool.page_size, pool.head_dim)
        row_bytes = pool.head_dim * pool.dtype.itemsize
        pages_P2TD = self._memory.lend(2 * shape[0] * pool.page_size * row_bytes).view(pool.dtype).view(shape)
        indices, blocks = [index.contiguous() for index in selection.indices], blocks.contiguous()
        assert all(index.dtype == torch.int64 for index in (*indices, blocks)), "indices are int64"
        args = PackArgs(
            k_pool=pool.k.data_ptr(),
            v_pool=pool.v.data_ptr(),
            blocks=blocks.data_ptr(),
            indices=(ctypes.c_void_p * len(indices))(*(index.data_ptr() for index in indices)),
            num_tokens=(ctypes.c_int64 * len(indices))(*lengths),
            pages=pages_P2TD.data_ptr(),
            num_layers=pool.num_layers,
            layer=layer,
            num_kv_heads=pool.num_kv_heads,
            page_size=pool.page_size,
            row_bytes=row_bytes,
            num_threads=torch.get_num_threads(),
        )
        pack_pages(self._library, args)
        return PackedLayer(pages_P2TD, lengths)
