"""Gathering a selection into head pages: the form in which packed KV travels and is stored.

Shapes: K KV heads, S tokens, X rows of a pool, D head dim, P head pages of the layer, n pages of one head, T tokens per
page, C = P * T slots of those pages.

Knows tensors of one layer. Knows neither the pool they come from nor the one they go to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.compress.base import Selection
from packlight.compress.layout import pages_of


@dataclass(frozen=True, eq=False, slots=True)
class PackedLayer:
    """The kept KV of one layer: `pages` [P, 2, T, D], each page of K followed by its page of V, pages of head 0 first.

    Head k has `lengths[k]` tokens, in ascending order of position, on whole pages of its own; what is left of its last
    page is zero. Fresh from `pack` the pages are contiguous, which is how `native` sends them: without a copy."""

    pages: Tensor
    lengths: tuple[int, ...]

    @property
    def k_pages(self) -> Tensor:
        """[P, T, D]"""
        return self.pages[:, 0]

    @property
    def v_pages(self) -> Tensor:
        """[P, T, D]"""
        return self.pages[:, 1]

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]


def pack(k_KSD: Tensor, v_KSD: Tensor, selection: Selection, page_size: int) -> PackedLayer:
    """The selected tokens of a layer as head pages: the plainest way, which all others must equal byte for byte.

    `k_KSD` and `v_KSD` reach at least to the last selected token."""
    lengths = selection.lengths()
    num_pages = [pages_of(length, page_size) for length in lengths]
    pages_P2TD = k_KSD.new_empty(sum(num_pages), 2, page_size, k_KSD.shape[-1])
    for head, pages_n2TD in enumerate(torch.split(pages_P2TD, num_pages)):
        for half, x_KSD in enumerate((k_KSD, v_KSD)):
            _gather(x_KSD[head], selection.indices[head], pages_n2TD[:, half])
    return PackedLayer(pages_P2TD, tuple(lengths))


def gather_pages(k_XD: Tensor, v_XD: Tensor, places: Sequence[Tensor], page_size: int) -> PackedLayer:
    """`pack` where the i-th token of head h is row `places[h][i]` (int64) of `k_XD` and `v_XD`.

    One gather of K and one of V for all heads together; the host waits for no device."""
    lengths = tuple(place.numel() for place in places)
    places_C = _places_by_slot(places, page_size)
    pages_P2TD = k_XD.new_empty(places_C.numel() // page_size, 2, page_size, k_XD.shape[-1])
    for half, x_XD in enumerate((k_XD, v_XD)):
        pages_P2TD[:, half] = x_XD.index_select(0, places_C).view(-1, page_size, x_XD.shape[-1])
    end = 0
    for length in lengths:
        end += pages_of(length, page_size)
        if length % page_size:
            pages_P2TD[end - 1, :, length % page_size :] = 0
    return PackedLayer(pages_P2TD, lengths)


def _places_by_slot(places: Sequence[Tensor], page_size: int) -> Tensor:
    """What each slot of the pages is filled from, [C]: each head's places, then any row up to the end of its last
    page."""
    any_T = places[0].new_zeros(page_size)
    return torch.cat([part for place in places for part in (place, any_T[: -place.numel() % page_size])])


def _gather(x_SD: Tensor, index: Tensor, pages_nTD: Tensor) -> None:
    """Writes the kept rows into the pages, one after another, and zeros after the last."""
    num_slots = pages_nTD.shape[0] * pages_nTD.shape[1]
    rows = x_SD.index_select(0, F.pad(index, (0, num_slots - index.numel())))
    pages_nTD.copy_(rows.view(pages_nTD.shape))
    if index.numel() < num_slots:
        pages_nTD[-1, index.numel() - num_slots :] = 0
