"""The tensor seams of packing: what may be looked at, what a scorer and a codec answer, what a selection is.

Shapes: W observation-window rows, S keys up to the anchor, N = S - W prefix positions, H query heads, K KV heads,
G = H / K query heads per KV head (query head h belongs to KV head h // G), D head dim, P head pages, T tokens per page.

Knows one request and one layer at a time. Knows no pool, no batch and no wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from packlight.compress.budget import Site
from packlight.core.types import PackSpec


@dataclass(frozen=True, eq=False, slots=True)
class LayerView:
    """What a selection may look at in one layer of one request.

    q_WHD: queries after RoPE of the last W = min(spec.window, S) tokens before the anchor; any dtype.
    k_KSD: exact keys after RoPE of the tokens 0 .. S-1, where S, the anchor, is the number of prompt tokens; any
        strides.
    scale: what the model multiplies q.k by.
    lse_WH: natural log of the sum over visible keys of exp(scale * q.k), if the attention backend has it.
    """

    q_WHD: Tensor
    k_KSD: Tensor
    scale: float
    layer: int
    num_layers: int
    lse_WH: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.k_KSD.shape[1]

    @property
    def site(self) -> Site:
        return Site(self.layer, self.num_layers, self.k_KSD.shape[0])


class Scorer(Protocol):
    """How much each prefix token matters to each KV head. One paper's idea, and nothing else of it.

    Forcing sinks and window, choosing, tie-breaking and gathering are written once, in `select` and `pack`."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Tensor:
        """Scores fp32 [K, N], higher is kept first, never NaN. `mass_KS` is `window_mass` of the view."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """Which tokens each KV head of a layer keeps.

    `indices[k]` are the token indices that KV head k keeps: int64, ascending, unique; lengths may differ by head.
    `retained_mass` is the share of the window's attention mass that lies on kept tokens, mean over KV heads; the
    window's own columns count as kept. It is 1 where the attention cannot tell the difference."""

    indices: tuple[Tensor, ...]
    retained_mass: float

    def lengths(self) -> list[int]:
        return [index.numel() for index in self.indices]


class Codec(Protocol):
    """Turns a layer's head pages into one flat payload and back. K and V pages are [P, T, D].

    The payload is contiguous uint8: all K pages, then all V pages."""

    def encode(self, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """The payload; may share memory with the pages."""
        ...

    def decode(
        self, payload: Tensor, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """K and V pages in the pool's dtype; may share memory with the payload.

        Raises ShipmentCorrupt when the payload's size is not `payload_bytes`."""
        ...

    def payload_bytes(self, num_pages: int, page_size: int, head_dim: int, pool_dtype: torch.dtype) -> int: ...
