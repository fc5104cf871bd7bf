"""The new token of every row: stored, and taken into its page's summary, with shapes that never depend on contents.

Does what `attention/stores.py` does for other backends. Legend as in `attention/base.py`, X = B * K, E = 2 * D.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.stores import new_token_slots
from packlight.attention.upload import upload


class TokenStore:
    """Memory stays where it is over all loads of as many rows."""

    def __init__(self, num_rows: int, num_layers: int, num_kv_heads: int, device: torch.device) -> None:
        self._slots_BLK = torch.zeros((num_rows, num_layers, num_kv_heads), dtype=torch.int64, device=device)
        self._num_dense_B: list[int] = []  # layers before this one are not summarised
        self._places: dict[tuple[int, ...], Tensor] = {}

    def load(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._slots_BLK.copy_(upload(new_token_slots(batch), self._slots_BLK.device))
        num_layers = self._slots_BLK.shape[1]
        self._num_dense_B = [num_layers if reading is None else reading.num_dense_layers for reading in batch.reads]

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, sliding_window: int | None) -> None:
        pool, slots_BK = self._batch.pool, self._slots_BLK[:, layer]
        k_TKD, v_TKD = k_TKD.to(pool.dtype), v_TKD.to(pool.dtype)
        pool.append(slots_BK.flatten(), k_TKD.flatten(0, 1), v_TKD.flatten(0, 1))
        places = tuple(place for place, num_dense in enumerate(self._num_dense_B) if layer >= num_dense)
        if not places or sliding_window is not None:
            return
        assert self._batch.summaries is not None
        if len(places) < len(k_TKD):
            index = self._index(places)
            slots_BK, k_TKD = slots_BK[index], k_TKD[index]
        summarise_tokens(self._batch.summaries.bounds_NE, slots_BK.flatten(), k_TKD.flatten(0, 1), pool.page_size)

    def _index(self, places: tuple[int, ...]) -> Tensor:
        if places not in self._places:
            self._places[places] = upload(np.array(places, dtype=np.int64), self._slots_BLK.device)
        return self._places[places]


def summarise_tokens(bounds_NE: Tensor, slots_X: Tensor, k_XD: Tensor, page_size: int) -> None:
    """One more key in the pages of these slots. A page's first token begins its summary anew."""
    pages_X, is_first_X1 = slots_X // page_size, (slots_X % page_size == 0)[:, None]
    low_XD, high_XD = bounds_NE.index_select(0, pages_X).chunk(2, dim=-1)
    low_XD = torch.where(is_first_X1, k_XD, torch.minimum(low_XD, k_XD))
    high_XD = torch.where(is_first_X1, k_XD, torch.maximum(high_XD, k_XD))
    bounds_NE.index_copy_(0, pages_X, torch.cat([low_XD, high_XD], dim=-1))
