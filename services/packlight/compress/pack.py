"""Gathering a selection into head pages: the form in which packed KV travels and is stored.

Shapes: K KV heads, S tokens, D head dim, P head pages of the layer, T tokens per page.

Knows tensors of one layer. Knows neither the pool they come from nor the one they go to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packlight.compress.base import Selection
from packlight.compress.layout import pages_of, total_pages


@dataclass(frozen=True, eq=False, slots=True)
class PackedLayer:
    """The kept KV of one layer: `k_pages` and `v_pages` [P, T, D], pages of head 0 first, then head 1, ...

    Head k has `lengths[k]` tokens, in ascending order of position, on whole pages of its own; what is left of its last
    page is zero. Fresh from `pack` the two are halves of one contiguous buffer, so `native` encodes without a copy."""

    k_pages: Tensor
    v_pages: Tensor
    lengths: tuple[int, ...]

    @property
    def num_pages(self) -> int:
        return self.k_pages.shape[0]


def pack(k_KSD: Tensor, v_KSD: Tensor, selection: Selection, page_size: int) -> PackedLayer:
    """The selected tokens of a layer as head pages. `k_KSD` and `v_KSD` reach at least to the last selected token."""
    lengths = selection.lengths()
    num_pages, head_dim = total_pages(lengths, page_size), k_KSD.shape[-1]
    pages_2PTD = k_KSD.new_empty(2, num_pages, page_size, head_dim)
    for half, x_KSD in enumerate((k_KSD, v_KSD)):
        _gather(x_KSD, selection, pages_2PTD[half].view(-1, head_dim), page_size)
    return PackedLayer(pages_2PTD[0], pages_2PTD[1], tuple(lengths))


def _gather(x_KSD: Tensor, selection: Selection, slots_XD: Tensor, page_size: int) -> None:
    """Writes each head's kept rows into its run of slots (X = P * T), and zeros after them to the end of its page."""
    start = 0
    for x_SD, index in zip(x_KSD, selection.indices, strict=True):
        end = start + index.numel()
        next_start = start + pages_of(index.numel(), page_size) * page_size
        torch.index_select(x_SD, 0, index, out=slots_XD[start:end])
        slots_XD[end:next_start] = 0
        start = next_start
