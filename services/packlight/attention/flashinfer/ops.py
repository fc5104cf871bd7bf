"""What a decode step does to pages beside attending to them, in three operations, each one kernel on a GPU.

Knows which of them are computed how: by Triton's kernels (`page_kernels.py`, `store_kernel.py`) where there are a GPU
and Triton, else by torch. Torch's are the twins that tests hold the kernels against: many operations each, and no shape
and no branch that depends on what is in a tensor.

Why Triton and not FlashInfer's own kernels for such things: each of those is one more module for nvcc to compile at the
first start, and none of them knows page summaries or our rule for ties. These take a second or two each to compile, and
Triton's interpreter lets CI run them.

Legend as in `attention/base.py` and `heads.py`: X = B * K heads, Y heads whose pages are chosen, G query heads of one,
M pages per head, E = 2 * D, N head pages, J entries of all page lists, R ratings of a page.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from packlight.attention.flashinfer.choice import choose_pages
from packlight.attention.flashinfer.heads import Field, LayerTable, SparseHeads
from packlight.attention.flashinfer.rating import mass_of, ratings
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool, PackedPool
from packlight.kv.reading import PageRule

# Pools whose pages are numbers, read and written where they lie.
PLAIN_POOLS = (KVPool, FP8Pool)


class TokenPlaces(NamedTuple):
    """Of a step's new tokens: their slots, int64, and the number of layers, int64, from whose end on a row is
    summarised."""

    slots_LX: Tensor
    num_dense_B: Tensor


class PageOps(Protocol):
    def store(
        self, pool: PackedPool, bounds_NE: Tensor | None, layer: int, k_BKD: Tensor, v_BKD: Tensor, places: TokenPlaces
    ) -> None:
        """One token of every head in its page and, where there are summaries, in the page's summary, which its first
        token begins anew."""
        ...

    def rate(
        self, rule: PageRule, q_XGD: Tensor, scale: float, bounds_NE: Tensor, table: LayerTable, heads: SparseHeads
    ) -> Tensor:
        """fp32 `[Y, R, M]`, M = `heads.max_stored`, for `pick`; anything where a head has no page."""
        ...

    def pick(
        self, ratings_YRM: Tensor, table: LayerTable, heads: SparseHeads, indices_J: Tensor, *, are_logits: bool
    ) -> None:
        """Write the page list of every head: ids of its first page, its last, and the best of the others; ties to the
        lower ordinal, ascending. If they `are_logits`, a page's score is its share of the attention of all tokens, mean
        over R rows; otherwise R is 1, and the ratings are the scores."""
        ...


def has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def page_ops(device: torch.device) -> PageOps:
    """The fastest there are."""
    if not has_triton(device):
        return TorchPageOps()
    compiled: PageOps = importlib.import_module("packlight.attention.flashinfer.page_kernels").TritonPageOps()
    return compiled


class TorchPageOps:
    """The twins."""

    def store(
        self, pool: PackedPool, bounds_NE: Tensor | None, layer: int, k_BKD: Tensor, v_BKD: Tensor, places: TokenPlaces
    ) -> None:
        k_XD, v_XD = k_BKD.to(pool.dtype).flatten(0, 1), v_BKD.to(pool.dtype).flatten(0, 1)
        slots_X = places.slots_LX[layer]
        pool.append(slots_X, k_XD, v_XD)
        if bounds_NE is None:
            return
        pages_X, is_first_X1 = slots_X // pool.page_size, (slots_X % pool.page_size == 0)[:, None]
        is_kept_X1 = (layer < places.num_dense_B).repeat_interleave(k_BKD.shape[1], output_size=len(slots_X))[:, None]
        old_XE = bounds_NE.index_select(0, pages_X)
        low_XD, high_XD = old_XE.chunk(2, dim=-1)
        low_XD = torch.where(is_first_X1, k_XD, torch.minimum(low_XD, k_XD))
        high_XD = torch.where(is_first_X1, k_XD, torch.maximum(high_XD, k_XD))
        new_XE = torch.cat([low_XD, high_XD], dim=-1)
        bounds_NE.index_copy_(0, pages_X, torch.where(is_kept_X1, old_XE, new_XE))

    def rate(
        self, rule: PageRule, q_XGD: Tensor, scale: float, bounds_NE: Tensor, table: LayerTable, heads: SparseHeads
    ) -> Tensor:
        q_YGD = q_XGD.index_select(0, heads[Field.ASKED]).float()
        pages_YM = heads.pages_YM(table)
        bounds_YME = bounds_NE.index_select(0, pages_YM.flatten()).view(*pages_YM.shape, -1)
        return ratings(rule, q_YGD, scale, bounds_YME.float())

    def pick(
        self, ratings_YRM: Tensor, table: LayerTable, heads: SparseHeads, indices_J: Tensor, *, are_logits: bool
    ) -> None:
        num_read_Y, width = heads[Field.NUM_READ], heads.max_read
        scores_YM = mass_of(ratings_YRM, heads.num_tokens_YM) if are_logits else ratings_YRM[:, 0]
        ordinals_YC = choose_pages(scores_YM, heads.num_stored_Y, num_read_Y, width)
        place_YC = heads[Field.TABLE][:, None] + table.before + ordinals_YC
        # Those beyond what a head reads repeat its last page: they are written where that is.
        entry_YC = torch.minimum(torch.arange(width, device=indices_J.device), num_read_Y[:, None] - 1)
        entry_YC = entry_YC + heads[Field.BEGIN][:, None]
        indices_J.index_copy_(0, entry_YC.flatten(), table.ids.index_select(0, place_YC.flatten()))
