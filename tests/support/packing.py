"""Inputs and slow oracles for packing: random layers with a sharp attention, and a materialised softmax."""

import torch
from torch import Tensor

from packlight.compress.base import LayerView


def make_view(
    num_tokens: int,
    window: int,
    *,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LayerView:
    """Queries are scaled up: a nearly uniform attention would leave the ranking to rounding."""
    generator = torch.Generator().manual_seed(seed)
    q_WHD = 4 * torch.randn(min(window, num_tokens), num_kv_heads * group, head_dim, generator=generator)
    k_KSD = torch.randn(num_kv_heads, num_tokens, head_dim, generator=generator)
    return LayerView(q_WHD.to(dtype), k_KSD.to(dtype), head_dim**-0.5, layer=1, num_layers=4)


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
    return LayerView(view.q_WHD[:, q_heads], view.k_KSD[order], view.scale, view.layer, view.num_layers)
