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
    """Memory stays where it is over all loads of as many rows. What depends on lengths alone is worked out in `load`,
    for all layers: in a captured step every launch counts."""

    def __init__(self, num_rows: int, num_layers: int, num_kv_heads: int, device: torch.device) -> None:
        self._places_3LX = torch.zeros((3, num_layers, num_rows * num_kv_heads), dtype=torch.int64, device=device)
        self._is_first_LX1 = torch.zeros((*self._places_3LX.shape[1:], 1), dtype=torch.bool, device=device)
        self._num_dense_B: list[int] = []  # layers before this one are not summarised
        self._heads: dict[tuple[int, ...], Tensor] = {}

    def load(self, batch: DecodeBatch) -> None:
        self._batch, page_size = batch, batch.pool.page_size
        slots_LX = new_token_slots(batch).swapaxes(0, 1).reshape(self._places_3LX.shape[1:])
        places = np.stack([slots_LX, slots_LX // page_size, slots_LX % page_size == 0])
        self._places_3LX.copy_(upload(places, self._places_3LX.device))
        self._is_first_LX1.copy_(self._places_3LX[2, :, :, None])
        num_layers = len(slots_LX)
        self._num_dense_B = [num_layers if reading is None else reading.num_dense_layers for reading in batch.reads]

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, sliding_window: int | None) -> None:
        pool, (slots_X, pages_X, _) = self._batch.pool, self._places_3LX[:, layer]
        k_XD, v_XD = k_TKD.to(pool.dtype).flatten(0, 1), v_TKD.to(pool.dtype).flatten(0, 1)
        pool.append(slots_X, k_XD, v_XD)
        places = tuple(place for place, num_dense in enumerate(self._num_dense_B) if layer >= num_dense)
        if not places or sliding_window is not None:
            return
        assert self._batch.summaries is not None
        is_first_X1 = self._is_first_LX1[layer]
        if len(places) < len(k_TKD):
            heads_X = self._heads_of(places)
            pages_X, is_first_X1, k_XD = pages_X[heads_X], is_first_X1[heads_X], k_XD[heads_X]
        summarise_tokens(self._batch.summaries.bounds_NE, pages_X, is_first_X1, k_XD)

    def _heads_of(self, places: tuple[int, ...]) -> Tensor:
        """The heads of these rows among all."""
        if places not in self._heads:
            num_kv_heads = self._batch.pool.num_kv_heads
            heads = np.array(places)[:, None] * num_kv_heads + np.arange(num_kv_heads)
            self._heads[places] = upload(heads.ravel().astype(np.int64), self._places_3LX.device)
        return self._heads[places]


def summarise_tokens(bounds_NE: Tensor, pages_X: Tensor, is_first_X1: Tensor, k_XD: Tensor) -> None:
    """One more key in these pages. A page's first token begins its summary anew."""
    low_XD, high_XD = bounds_NE.index_select(0, pages_X).chunk(2, dim=-1)
    low_XD = torch.where(is_first_X1, k_XD, torch.minimum(low_XD, k_XD))
    high_XD = torch.where(is_first_X1, k_XD, torch.maximum(high_XD, k_XD))
    bounds_NE.index_copy_(0, pages_X, torch.cat([low_XD, high_XD], dim=-1))
