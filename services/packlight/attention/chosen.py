"""The pages that a part of a decode step reads: all of them, or those that its reader rates best.

Legend as in `attention/base.py`, E = 2 * D, N rows of one part (`parts.py`), C pages read per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch
from packlight.attention.parts import Part
from packlight.attention.scratch import Scratch
from packlight.kv.reading import PageQuery


class ChosenPages:
    """Made once per step."""

    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._summaries = Scratch(batch.pool.dtype, batch.pool.device)
        self._bounds = Scratch(torch.float32, batch.pool.device)

    def of(self, part: Part, layer: int, q_NKGD: Tensor, scale: float) -> Tensor:
        """Page ids int64 `[N, K, C]`, ascending by place in the row; those that read fewer repeat one of theirs."""
        pages_NKM = part.pages(layer)
        if part.reader is None:
            return pages_NKM
        bounds_NKME = self._read_bounds(pages_NKM)
        choice, num_tokens_NKM = part.choice(layer)
        scores_NKM = part.reader.score(PageQuery(layer, part.rows, q_NKGD, scale, bounds_NKME, num_tokens_NKM))
        return pages_NKM.gather(-1, choice.best(scores_NKM))

    def _read_bounds(self, pages_NKM: Tensor) -> Tensor:
        """fp32 `[N, K, M, E]`."""
        assert self._batch.summaries is not None
        shape = (*pages_NKM.shape, 2 * self._batch.pool.head_dim)
        stored_XE = self._summaries.take(pages_NKM.numel(), shape[-1])
        self._batch.summaries.read(pages_NKM.flatten(), stored_XE)
        return self._bounds.take(*shape).copy_(stored_XE.view(shape))
