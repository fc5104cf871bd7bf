"""Where the tokens of a batch are stored: the index arithmetic that every backend shares.

Knows page ids, offsets and slots. Legend as in `attention/base.py`, P page size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, PrefillBatch
from packlight.kv.table import Int32s

Int64s = npt.NDArray[np.int64]


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
    """The new token of every (row, layer, head): stored, and summarised where its row may be read sparsely.

    Made once per step, when it empties the summaries of pages that get their first token."""

    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        slots_BLK = new_token_slots(batch)
        self._slots_BLK = torch.from_numpy(slots_BLK).to(batch.pool.device)
        self._pages_BLK = self._slots_BLK // batch.pool.page_size
        reads = enumerate(batch.reads)
        self._num_dense_layers = {index: read.num_dense_layers for index, read in reads if read is not None}
        if batch.summaries is not None and self._num_dense_layers:
            batch.summaries.begin(self._first_pages(slots_BLK))

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, sliding_window: int | None) -> None:
        self._batch.pool.append(self._slots_BLK[:, layer].flatten(), k_TKD.flatten(0, 1), v_TKD.flatten(0, 1))
        summarised = [index for index, num_dense in self._num_dense_layers.items() if layer >= num_dense]
        if not summarised or sliding_window is not None:
            return
        assert self._batch.summaries is not None
        index = slice(None) if len(summarised) == len(k_TKD) else summarised
        self._batch.summaries.add(self._pages_BLK[index, layer].flatten(), k_TKD[index].flatten(0, 1))

    def _first_pages(self, slots_BLK: Int64s) -> Tensor:
        """Head pages that get their first token, of the rows and layers that are summarised."""
        is_first_BLK = slots_BLK % self._batch.pool.page_size == 0
        for index in range(len(is_first_BLK)):
            num_dense = self._num_dense_layers.get(index, is_first_BLK.shape[1])
            is_first_BLK[index, :num_dense] = False
        pages = slots_BLK[is_first_BLK] // self._batch.pool.page_size
        return torch.from_numpy(pages).to(self._batch.pool.device)


def new_token_slots(batch: DecodeBatch) -> Int64s:
    """The token slot of the new token of every (row, layer, head), `[B, L, K]`."""
    rows, page_size = list(batch.rows), batch.pool.page_size
    index = batch.table.new_index(rows)
    row, layer, head = np.ogrid[: len(rows), : index.shape[1], : index.shape[2]]
    pages = batch.table.pages[np.asarray(rows)[row], layer, head, index // page_size]
    slots: Int64s = pages.astype(np.int64) * page_size + index % page_size
    return slots


def stored_pages(batch: DecodeBatch, rows: list[int], num_pages_NLK: Int32s) -> Tensor:
    """Page ids `[N, L, K, M]` int64 of `rows` whose heads hold `num_pages_NLK` >= 1 pages, the shorter ones filled up
    with their first: what the table has behind their last may belong to another request."""
    pages = batch.table.pages[rows][..., : num_pages_NLK.max(initial=1)]
    is_held = np.arange(pages.shape[-1]) < num_pages_NLK[..., None]
    return torch.from_numpy(np.where(is_held, pages, pages[..., :1]).astype(np.int64)).to(batch.pool.device)
