"""The new token of every row: stored, and taken into its page's summary, with shapes that never depend on contents.

Does what `attention/stores.py` does for other backends. Legend as in `attention/base.py`, X = B * K.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.flashinfer.ops import PageOps, TokenPlaces
from packlight.attention.stores import new_token_slots
from packlight.attention.upload import upload


class TokenStore:
    """Memory stays where it is over all loads of as many rows. What depends on lengths alone is worked out in `load`,
    for all layers: in a captured step every launch counts."""

    def __init__(self, num_rows: int, num_layers: int, num_kv_heads: int, device: torch.device, ops: PageOps) -> None:
        self._ops = ops
        zeros = torch.zeros(num_layers * num_rows * num_kv_heads + num_rows, dtype=torch.int64, device=device)
        self._memory, slots, num_dense_B = zeros, zeros[:-num_rows], zeros[-num_rows:]
        self._places = TokenPlaces(slots.view(num_layers, num_rows * num_kv_heads), num_dense_B)
        self._first_summarised = num_layers

    def load(self, batch: DecodeBatch) -> None:
        self._batch, num_layers = batch, batch.pool.num_layers
        slots_LX = new_token_slots(batch).swapaxes(0, 1)
        reads = batch.reads or [None] * len(batch.rows)
        num_dense_B = [num_layers if reading is None else reading.num_dense_layers for reading in reads]
        self._first_summarised = min(num_dense_B)
        loaded = np.concatenate([slots_LX.ravel(), np.array(num_dense_B, dtype=np.int64)])
        self._memory.copy_(upload(loaded, self._memory.device))

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, sliding_window: int | None) -> None:
        summaries = self._batch.summaries
        is_summarised = layer >= self._first_summarised and sliding_window is None
        bounds_NE = summaries.bounds_NE if is_summarised and summaries is not None else None
        self._ops.store(self._batch.pool, bounds_NE, layer, k_TKD, v_TKD, self._places)
