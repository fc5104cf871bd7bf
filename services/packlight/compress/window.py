"""Attention mass that the last rows of a prompt put on every key, replayed without materialising the attention.

Shapes: W window rows, S keys, H query heads, K KV heads, G = H / K, R = G * W folded rows, D head dim, T keys of a
tile.

Attention kernels return outputs, not probabilities. But softmax(s) = exp(s - lse), so one pass over the keys gives the
log-sum-exp (or the kernel supplies it) and a second pass the probabilities, which are summed at once. Memory is one
tile, never [H, W, S]; work is two thin matrix products, W / S of the layer's own attention each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on CPU: a tile of scores that stays in the L2 cache halves the time of one that does not.
TILE = 512


def window_mass(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None = None, *, tile: int = TILE
) -> Tensor:
    """Mass fp32 [K, S]: softmax(scale * q.k) under the causal mask, summed over the W rows and the group's G heads.

    Row i is token S - W + i and sees keys 0 .. S - W + i, so each KV head's masses add up to W * G. `lse_WH` (natural
    log, of the scaled scores) saves the first pass. Accumulates in fp32 whatever the dtype. Needs 1 <= W <= S."""
    window, num_keys = q_WHD.shape[0], k_KSD.shape[1]
    assert 1 <= window <= num_keys, (q_WHD.shape, k_KSD.shape)
    tiles = _Tiles(_fold(q_WHD, k_KSD.shape[0]) * scale, k_KSD, window, tile)
    if lse_WH is None:
        lse_KR1 = _log_sum_exp(tiles)
    else:
        lse_KR1 = _fold(lse_WH.unsqueeze(-1), k_KSD.shape[0])
    mass_KS = lse_KR1.new_empty(k_KSD.shape[:2])
    for start in range(0, num_keys, tile):
        weights_KRT = tiles.scores(start).sub_(lse_KR1).exp_()
        torch.sum(weights_KRT, dim=1, out=mass_KS[:, start : start + tile])
    return mass_KS


def _fold(x_WHD: Tensor, num_kv_heads: int) -> Tensor:
    """[W, H, D] -> fp32 [K, G * W, D]: the heads that share keys become rows of one matrix product."""
    window, num_heads, last = x_WHD.shape
    x_WKGD = x_WHD.float().reshape(window, num_kv_heads, num_heads // num_kv_heads, last)
    return x_WKGD.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, last)


def _log_sum_exp(tiles: _Tiles) -> Tensor:
    """[K, R, 1] over all keys. Every row sees key 0, so its running maximum is finite from the first tile on."""
    max_KR1 = tiles.q_KRD.new_full((*tiles.q_KRD.shape[:2], 1), -torch.inf)
    sum_KR1 = torch.zeros_like(max_KR1)
    for start in range(0, tiles.k_KSD.shape[1], tiles.width):
        scores_KRT = tiles.scores(start)
        new_max_KR1 = torch.maximum(max_KR1, scores_KRT.amax(dim=-1, keepdim=True))
        sum_KR1.mul_((max_KR1 - new_max_KR1).exp_())
        sum_KR1.add_(scores_KRT.sub_(new_max_KR1).exp_().sum(dim=-1, keepdim=True))
        max_KR1 = new_max_KR1
    return sum_KR1.log_().add_(max_KR1)


class _Tiles:
    """Masked scores of one tile of keys at a time, in one buffer that every tile overwrites."""

    def __init__(self, q_KRD: Tensor, k_KSD: Tensor, window: int, width: int) -> None:
        self.q_KRD, self.k_KSD, self.window, self.width = q_KRD, k_KSD, window, width
        num_scores = q_KRD.shape[0] * q_KRD.shape[1] * min(width, k_KSD.shape[1])
        self._buffer = q_KRD.new_empty(num_scores)

    def scores(self, start: int) -> Tensor:
        """[K, R, T] of keys start .. start + T - 1, -inf where a row may not look. Valid until the next call."""
        num_heads, num_rows, _ = self.q_KRD.shape
        k_KTD = self.k_KSD[:, start : start + self.width].float()
        num_keys = k_KTD.shape[1]
        scores_KRT = self._buffer[: num_heads * num_rows * num_keys].view(num_heads, num_rows, num_keys)
        torch.bmm(self.q_KRD, k_KTD.transpose(1, 2), out=scores_KRT)
        first_row = self.k_KSD.shape[1] - self.window
        if start + num_keys - 1 > first_row:
            self._hide_future(scores_KRT, start, first_row)
        return scores_KRT

    def _hide_future(self, scores_KRT: Tensor, start: int, first_row: int) -> None:
        num_heads, _, num_keys = scores_KRT.shape
        row_W1 = torch.arange(first_row, first_row + self.window, device=scores_KRT.device).unsqueeze(1)
        key_T = torch.arange(start, start + num_keys, device=scores_KRT.device)
        scores_KRT.view(num_heads, -1, self.window, num_keys).masked_fill_(key_T > row_W1, -torch.inf)
