"""Where the tokens of a batch are stored: the index arithmetic that every backend shares.

Knows page ids, offsets and slots. Legend as in `attention/base.py`, P page size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, PrefillBatch
from packlight.kv.table import Int32s


def chunk_places(batch: PrefillBatch) -> tuple[Tensor, Tensor]:
    """(block, offset in the block) of every new token of the batch, both `[T]` int64."""
    page_size = batch.pool.page_size
    blocks, offsets = [], []
    for chunk in batch.chunks:
        index = torch.arange(chunk.num_context, chunk.num_stored, device=chunk.blocks.device)
        blocks.append(chunk.blocks[index // page_size])
        offsets.append(index % page_size)
    return torch.cat(blocks), torch.cat(offsets)


class NewTokens:
    """The new token of every (row, layer, head): stored, and summarised where its row may be read sparsely."""

    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._slots_BLK = new_token_slots(batch)
        self._pages_BLK = self._slots_BLK // batch.pool.page_size
        self._is_first_BLK = self._slots_BLK % batch.pool.page_size == 0

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, sliding_window: int | None) -> None:
        self._batch.pool.append(self._slots_BLK[:, layer].flatten(), k_TKD.flatten(0, 1), v_TKD.flatten(0, 1))
        if sliding_window is None:
            self._summarise(layer, k_TKD)

    def _summarise(self, layer: int, k_TKD: Tensor) -> None:
        reads = enumerate(self._batch.reads)
        index = [i for i, reading in reads if reading is not None and layer >= reading.num_dense_layers]
        if index:
            assert self._batch.summaries is not None
            pages_X, is_first_X = (x_BLK[index, layer].flatten() for x_BLK in (self._pages_BLK, self._is_first_BLK))
            self._batch.summaries.add(pages_X, k_TKD[index].flatten(0, 1), is_first_X)


def new_token_slots(batch: DecodeBatch) -> Tensor:
    """The token slot of the new token of every (row, layer, head): `[B, L, K]` int64."""
    rows, page_size = list(batch.rows), batch.pool.page_size
    index = batch.table.new_index(rows)
    pages = np.take_along_axis(batch.table.pages[rows], (index // page_size)[..., None], axis=-1)[..., 0]
    slots = pages.astype(np.int64) * page_size + index % page_size
    return torch.from_numpy(slots).to(batch.pool.device)


def stored_pages(batch: DecodeBatch, rows: list[int], num_pages_NLK: Int32s) -> Tensor:
    """Page ids `[N, L, K, M]` int64 of `rows` whose heads hold `num_pages_NLK` >= 1 pages, the shorter ones filled up
    with their first: what the table has behind their last may belong to another request."""
    pages = batch.table.pages[rows][..., : num_pages_NLK.max(initial=1)]
    is_held = np.arange(pages.shape[-1]) < num_pages_NLK[..., None]
    return torch.from_numpy(np.where(is_held, pages, pages[..., :1]).astype(np.int64)).to(batch.pool.device)
