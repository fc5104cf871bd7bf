"""The tensor seams of packing: what may be looked at, what scorers, budgets and codecs answer, what a selection is.

Shapes: W observation-window rows, S keys up to the anchor, N = S - W prefix positions, H query heads, K KV heads,
G = H / K query heads per KV head (query head h belongs to KV head h // G), D head dim, P head pages, T tokens per page.

Knows one request and one layer at a time. Knows no pool, no batch and no wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    lse_WH: natural log of the sum over visible keys of exp(scale * q.k), if it is known. Scorers always have it.
    mass_KS: `window.window_attention`'s, if it is known. Keys may then have D = 0, unless the recipe looks at them.
    accumulated_KS: attention mass that the queries of *all* S tokens put on every key, summed over rows and group,
        fp32; there only for recipes that need all queries.
    """

    q_WHD: Tensor
    k_KSD: Tensor
    scale: float
    layer: int
    num_layers: int
    lse_WH: Tensor | None = None
    accumulated_KS: Tensor | None = None
    mass_KS: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.k_KSD.shape[1]

    @property
    def site(self) -> Site:
        return Site(self.layer, self.num_layers, self.k_KSD.shape[0])


class Scored(NamedTuple):
    """scores_KN: fp32, higher is kept first, never NaN. `layer_weight` >= 0: how much the layer as a whole wants, for
    budgets that divide a prompt's tokens among layers."""

    scores_KN: Tensor
    layer_weight: float = 1.0


class Scorer(Protocol):
    """How much each prefix token matters to each KV head. One paper's idea, and nothing else of it.

    Forcing sinks and window, choosing, tie-breaking and gathering are written once, in `select` and `pack`."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Scored:
        """`mass_KS` is `window_mass` of the view. May return its inputs; the caller copies before it changes them."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Candidates:
    """One scored layer, before lengths are decided. scores_KN has +inf at the sinks."""

    site: Site
    num_tokens: int
    scores_KN: Tensor
    mass_KS: Tensor
    layer_weight: float

    @property
    def num_prefix(self) -> int:
        return self.scores_KN.shape[1]

    @property
    def window(self) -> int:
        return self.num_tokens - self.num_prefix


class LayerBudget(Protocol):
    """The lengths of one layer at a time: tokens kept per head, window included, within the bounds of `Budget`."""

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        """[K]"""
        ...


class ModelBudget(Protocol):
    """The lengths of all layers at once, when the last one is scored. Sliding-window layers are not among them."""

    def divide(self, spec: PackSpec, layers: Sequence[Candidates]) -> list[list[int]]:
        """[layers, K]"""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """Which tokens each KV head of a layer keeps.

    `indices[k]` are the token indices that KV head k keeps: int64, ascending, unique; lengths may differ by head.
    `retained_mass` is the share of the window's attention mass that lies on kept tokens, mean over KV heads; the
    window's own columns count as kept. It is 1 where the attention cannot tell the difference. As a tensor it is still
    being computed: `select.read_masses` waits for it.
    `num_grown` tokens, over all heads, were added to hold the request's mass floor."""

    indices: tuple[Tensor, ...]
    retained_mass: float | Tensor
    num_grown: int = 0

    def lengths(self) -> list[int]:
        return [index.numel() for index in self.indices]


class Codec(Protocol):
    """Whole head pages <-> records of a fixed size. A record needs nothing but itself to be read, so the same bytes
    travel on the wire and lie in a packed pool. Pages that are only partly filled never come here (`payload.py`).

    `is_exact`: what is decoded is what was encoded, to the last bit."""

    is_exact: bool

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of K and V of one head page."""
        ...

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        """Records, uint8 [P, record_bytes]; may share memory with the pages. The pages are those of head 0 first."""
        ...

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V pages [P, T, D] in `dtype`; may share memory with the records."""
        ...
