"""Inputs and slow oracles for packing: random layers with a sharp attention, and a materialised softmax."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import LayerView, Selection
from packlight.compress.select import Selector
from packlight.core.types import PackSpec


def draw(
    num_tokens: int,
    *,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries [S, H, D] and keys [K, S, D] of one layer.

    Queries are scaled up: a nearly uniform attention would leave the ranking to rounding."""
    generator = torch.Generator().manual_seed(seed)
    q_SHD = 4 * torch.randn(num_tokens, num_kv_heads * group, head_dim, generator=generator)
    k_KSD = torch.randn(num_kv_heads, num_tokens, head_dim, generator=generator)
    return q_SHD.to(dtype), k_KSD.to(dtype)


def view_of(
    q_SHD: Tensor, k_KSD: Tensor, window: int, *, layer: int = 1, num_layers: int = 4, cuts: Sequence[int] = ()
) -> LayerView:
    """What a selection sees of the layer when its prompt was computed in chunks that end at `cuts`."""
    num_tokens, scale = q_SHD.shape[0], q_SHD.shape[2] ** -0.5
    sums, start = AccumulatedMass(1, k_KSD.shape[0], num_tokens, k_KSD.device), 0
    for end in (*cuts, num_tokens):
        sums.add(0, q_SHD[start:end], k_KSD[:, :end], scale)
        start = end
    q_WHD = q_SHD[-min(window, num_tokens) :]
    return LayerView(q_WHD, k_KSD, scale, layer, num_layers, accumulated_KS=sums.layer(0))


def make_view(num_tokens: int, window: int, *, layer: int = 1, num_layers: int = 4, **shape: object) -> LayerView:
    """One layer; `shape` as for `draw`."""
    return view_of(*draw(num_tokens, **shape), window, layer=layer, num_layers=num_layers)


def make_layers(num_tokens: int, window: int, num_layers: int, *, seed: int = 0, **shape: object) -> list[LayerView]:
    """All layers of a model, each with an attention of its own."""
    return [
        make_view(num_tokens, window, layer=layer, num_layers=num_layers, seed=100 * seed + layer, **shape)
        for layer in range(num_layers)
    ]


def select_all(
    views: Sequence[LayerView],
    spec: PackSpec,
    *,
    num_tokens: int | None = None,
    sliding_windows: Sequence[int | None] | None = None,
) -> list[Selection]:
    """Every layer's selection, by one `Selector`. Checks that they come out in order, each once."""
    anchor = views[0].num_tokens
    selector = Selector(spec, num_prompt_tokens=anchor, num_tokens=anchor if num_tokens is None else num_tokens)
    ready = []
    for view, sliding_window in zip(views, sliding_windows or (None,) * len(views), strict=True):
        ready += selector.add(view, sliding_window)
    assert [layer for layer, _ in ready] == list(range(len(views)))
    return [selection for _, selection in ready]


def naive_attention(view: LayerView) -> Tensor:
    """Probabilities fp64 [H, W, S], all of them."""
    group = view.q_WHD.shape[1] // view.k_KSD.shape[0]
    q_HWD, k_HSD = view.q_WHD.double().transpose(0, 1), view.k_KSD.double().repeat_interleave(group, dim=0)
    scores_HWS = view.scale * q_HWD @ k_HSD.transpose(1, 2)
    window, num_tokens = scores_HWS.shape[1:]
    seen_WS = torch.ones(window, num_tokens, dtype=torch.bool).tril(num_tokens - window)
    return scores_HWS.masked_fill(~seen_WS, -torch.inf).softmax(dim=-1)


def naive_mass(view: LayerView) -> Tensor:
    """fp64 [K, S]."""
    attention_HWS = naive_attention(view)
    return attention_HWS.sum(dim=1).unflatten(0, (view.k_KSD.shape[0], -1)).sum(dim=1)


def permute_heads(view: LayerView, order: list[int]) -> LayerView:
    """The same layer with its KV heads, and the query heads that belong to them, in another order."""
    group = view.q_WHD.shape[1] // view.k_KSD.shape[0]
    q_heads = [head * group + member for head in order for member in range(group)]
    assert view.accumulated_KS is not None
    return replace(
        view, q_WHD=view.q_WHD[:, q_heads], k_KSD=view.k_KSD[order], accumulated_KS=view.accumulated_KS[order]
    )
