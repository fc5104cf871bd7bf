"""Eviction while decoding: heavy hitters (H2O, arXiv 2306.14048, algorithm 1).

Knows how much attention each stored token of one request has had, and so which one makes room for the next. Does not
know keys, pages or tables: a token is the slot it is stored in.

The mass that the prompt gave to its kept tokens travels behind the layer's pages, because only prefill has seen it.

Legend: L layers that evict, S tokens of the prompt and the resumed answer, N <= S that were watched, K KV heads,
C slots (the most any head holds), X slots in use, B requests, H query heads, G = H / K, D head dim.

The paper appends a token, attends, and then drops one of C + 1. Here the newest token takes the slot of the dropped one
before it attends: the same sequence of choices, shifted by one step, and no slot C + 1 is ever needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.compress.budget import base_budget, keeps_all
from packlight.compress.recipes import find_recipe, param_of
from packlight.core.errors import ShipmentCorrupt
from packlight.core.types import PackSpec

_MASS = torch.float32
_NEVER = torch.iinfo(torch.int64).max


def evicts(spec: PackSpec) -> bool:
    """Whether the newest token of an answer takes the place of another one, once a head's budget is full."""
    return any(param.name == "evict" for param in find_recipe(spec.recipe).params) and bool(param_of(spec, "evict"))


def capacity(spec: PackSpec, num_prompt_tokens: int, max_tokens: int) -> int | None:
    """Tokens up to which a KV head may still grow after it has arrived; None: as far as the answer goes.

    0 where the prompt fills its budget: no head grows, whatever its share was. A shorter prompt leaves room; then the
    budget is that of prompt and answer together, which is the same number unless it is a ratio."""
    if not evicts(spec):
        return None
    return base_budget(spec, num_prompt_tokens + max_tokens) if keeps_all(spec, num_prompt_tokens) else 0


def mass_bytes(spec: PackSpec, lengths: Iterable[int]) -> int:
    """What the attention mass of a layer's kept tokens adds to its payload: nothing unless the request evicts."""
    return _MASS.itemsize * sum(lengths) if evicts(spec) else 0


def with_mass(payload: Tensor, indices: Sequence[Tensor], mass_KN: Tensor | None) -> Tensor:
    """`payload`, flat uint8, followed by the mass of the tokens at `indices[head]`, fp32, head by head. Tokens beyond
    the N that were watched, and all of them when none was, start at 0, like a token that decode stores."""
    if mass_KN is None:
        mass = torch.zeros(sum(index.numel() for index in indices), dtype=_MASS, device=payload.device)
    else:
        longest = max(int(index.max()) + 1 for index in indices)
        whole_KS = F.pad(mass_KN, (0, max(0, longest - mass_KN.shape[1])))
        mass = torch.cat([mass_S[index] for mass_S, index in zip(whole_KS, indices, strict=True)])
    return torch.cat([payload, mass.to(payload.device, _MASS).view(torch.uint8)])


def split_mass(payload: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `with_mass` put together: (payload, fp32 mass, copied). Raises ShipmentCorrupt if the mass is none."""
    num_bytes = _MASS.itemsize * sum(lengths)
    payload, tail = payload[: payload.numel() - num_bytes], payload[payload.numel() - num_bytes :]
    mass = tail.clone().view(_MASS)
    if not bool(((mass >= 0) & mass.isfinite()).all()):
        raise ShipmentCorrupt("the attention mass of a kept token is negative or not finite")
    return payload, mass


class Arrived(NamedTuple):
    """One layer as it arrived: tokens of each head, in ascending order of position, and their attention mass so far.

    mass: fp32, flat, head by head: `sum(lengths)` values."""

    layer: int
    lengths: Sequence[int]
    mass: Tensor


class HeavyHitters:
    """The stored tokens of one request, by slot, in the layers that evict."""

    def __init__(self, spec: PackSpec, layers: Sequence[Arrived], *, capacity: int, num_layers: int) -> None:
        """A head may grow up to `capacity`, or stays as it arrived. Layers that are not in `layers` always append."""
        self._num_layers, self._sinks = num_layers, spec.sinks
        self._index = {arrived.layer: index for index, arrived in enumerate(layers)}
        device = layers[0].mass.device
        self._length_LK = torch.tensor([arrived.lengths for arrived in layers], device=device)
        self._capacity_LK = self._length_LK.clamp(min=capacity)
        self._recent_LK = self._num_recent(param_of(spec, "recent"))
        num_slots = int(self._capacity_LK.max())
        slot_LKC = torch.arange(num_slots, device=device).repeat(*self._length_LK.shape, 1)
        is_stored_LKC = slot_LKC < self._length_LK[..., None]
        # A token's rank counts the tokens stored before it: the lower, the older. An empty slot is younger than all.
        self._rank_LKC = slot_LKC.masked_fill(~is_stored_LKC, _NEVER)
        self._next_LK = self._length_LK.clone()
        self._mass_LKC = torch.zeros(slot_LKC.shape, device=device)
        self._mass_LKC[is_stored_LKC] = torch.cat([arrived.mass for arrived in layers])

    def watches(self, layer: int) -> bool:
        return layer in self._index

    def add(self, layer: int, weights_KX: Tensor) -> None:
        """One more query has looked at the layer's slots; past a head's length the weights are 0."""
        num_slots = min(self._mass_LKC.shape[2], weights_KX.shape[1])
        self._mass_LKC[self._index[layer], :, :num_slots] += weights_KX[:, :num_slots]

    def place_next(self) -> Tensor:
        """The slot of each (layer, head) that the next token overwrites, -1 where it is appended: int64 [layers, K].

        That is the slot of the token with the least mass, ties to the older. The sinks and the most recent tokens are
        safe. The next token is from now on counted as stored, with no mass."""
        is_full_LK = self._length_LK >= self._capacity_LK
        slot_LK = torch.where(is_full_LK, self._victims(), self._length_LK)
        self._mass_LKC.scatter_(2, slot_LK[..., None], 0.0)
        self._rank_LKC.scatter_(2, slot_LK[..., None], self._next_LK[..., None])
        self._length_LK += ~is_full_LK
        self._next_LK += 1
        placed = slot_LK.new_full((self._num_layers, slot_LK.shape[1]), -1)
        placed[list(self._index)] = torch.where(is_full_LK, slot_LK, -1)
        return placed

    def _victims(self) -> Tensor:
        """[L, K]; means nothing where a head is not full."""
        oldest_safe_LK1 = (self._next_LK - self._recent_LK)[..., None]
        is_safe_LKC = (self._rank_LKC < self._sinks) | (self._rank_LKC >= oldest_safe_LK1)
        mass_LKC = self._mass_LKC.masked_fill(is_safe_LKC, torch.inf)
        is_least_LKC = (mass_LKC == mass_LKC.amin(dim=2, keepdim=True)) & ~is_safe_LKC
        return self._rank_LKC.masked_fill(~is_least_LKC, _NEVER).argmin(dim=2)

    def _num_recent(self, share: float) -> Tensor:
        """[L, K]: at least one token of a head is neither a sink nor recent."""
        most_LK = (self._capacity_LK - self._sinks - 1).clamp(min=0)
        return (self._capacity_LK.double() * share).long().minimum(most_LK)


def replay(q_BHD: Tensor, k_BKXD: Tensor, length_BK: Tensor, scale: float) -> Tensor:
    """What one query of each request gives to its stored tokens: attention weights summed over the group, fp32
    `[B, K, X]`, 0 past a head's length. `scale` is what the model multiplies q.k by."""
    num_requests, num_kv_heads, _, head_dim = k_BKXD.shape
    q_BKGD = q_BHD.float().view(num_requests, num_kv_heads, -1, head_dim)
    scores_BKGX = q_BKGD @ k_BKXD.float().transpose(2, 3) * scale
    slot_X = torch.arange(k_BKXD.shape[2], device=k_BKXD.device)
    is_unused_BK1X = (slot_X >= length_BK[..., None])[:, :, None]
    return scores_BKGX.masked_fill_(is_unused_BK1X, -torch.inf).softmax(-1).sum(2)
