"""The decode step of the torch backend: pages gathered into contiguous memory, then `scaled_dot_product_attention`.

Reading gathered pages costs one copy of what is read, per layer and step. A row with a reader copies the pages it reads
and the summaries of all its pages: that is where the time is saved. Legend as in `attention/base.py`, N rows
of one part (`parts.py`), C pages read per head, S tokens there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.attention.base import DecodeBatch, LayerQueries
from packlight.attention.chosen import ChosenPages
from packlight.attention.parts import Parts
from packlight.attention.scratch import Scratch
from packlight.attention.stores import NewTokens


class SdpaDecode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch, self._new_tokens, self._parts = batch, NewTokens(batch), Parts(batch)
        dtype, device = batch.pool.dtype, batch.pool.device
        self._chosen = ChosenPages(batch)
        self._k, self._v = Scratch(dtype, device), Scratch(dtype, device)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._new_tokens.store(layer, k_TKD, v_TKD, sliding_window)
        q_BKGD = q_THD.view(len(q_THD), self._batch.pool.num_kv_heads, -1, q_THD.shape[-1])
        out_BKGD = torch.empty_like(q_BKGD)
        for part in self._parts.of(layer, sliding_window):
            q_NKGD = q_BKGD[part.index]
            k_NKSD, v_NKSD = self._gather(self._chosen.of(part, layer, q_NKGD, scale))
            mask = part.mask(layer, sliding_window)
            out_BKGD[part.index] = F.scaled_dot_product_attention(q_NKGD, k_NKSD, v_NKSD, attn_mask=mask, scale=scale)
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return out_BKGD.flatten(1, 2)

    def _gather(self, pages_NKC: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, each `[N, K, S, D]`."""
        pool = self._batch.pool
        shape = (pages_NKC.numel(), pool.page_size, pool.head_dim)
        k_XPD, v_XPD = self._k.take(*shape), self._v.take(*shape)
        pool.gather(pages_NKC.flatten(), k_XPD, v_XPD)
        shape_NKSD = (*pages_NKC.shape[:2], -1, pool.head_dim)
        return k_XPD.view(shape_NKSD), v_XPD.view(shape_NKSD)
