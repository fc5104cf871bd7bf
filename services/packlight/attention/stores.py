"""Where the tokens of a batch are stored: the index arithmetic that every backend shares.

Knows page ids, offsets and slots. Legend as in `attention/base.py`, P page size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, PrefillBatch


def chunk_places(batch: PrefillBatch) -> tuple[Tensor, Tensor]:
    """(block, offset in the block) of every new token of the batch, both `[T]` int64."""
    page_size = batch.pool.page_size
    blocks, offsets = [], []
    for chunk in batch.chunks:
        index = torch.arange(chunk.num_context, chunk.num_stored, device=chunk.blocks.device)
        blocks.append(chunk.blocks[index // page_size])
        offsets.append(index % page_size)
    return torch.cat(blocks), torch.cat(offsets)


def append_slots(batch: DecodeBatch) -> Tensor:
    """The token slot of the new token of every (row, layer, head): `[B, L, K]` int64."""
    rows, page_size = list(batch.rows), batch.pool.page_size
    lengths = batch.table.lengths[rows]
    pages = np.take_along_axis(batch.table.pages[rows], (lengths // page_size)[..., None], axis=-1)[..., 0]
    slots = pages.astype(np.int64) * page_size + lengths % page_size
    return torch.from_numpy(slots).to(batch.pool.k.device)


def pages_and_lengths(batch: DecodeBatch) -> tuple[Tensor, Tensor]:
    """Page ids `[B, L, K, M]` and lengths including the new token `[B, L, K]`, both int64."""
    rows, page_size = list(batch.rows), batch.pool.page_size
    lengths = batch.table.lengths[rows] + 1
    num_columns = -(-int(lengths.max(initial=1)) // page_size)
    pages = batch.table.pages[rows][..., :num_columns].astype(np.int64)
    device = batch.pool.k.device
    return torch.from_numpy(pages).to(device), torch.from_numpy(lengths.astype(np.int64)).to(device)
