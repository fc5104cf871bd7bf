"""Attention that the last rows of a prompt pay to every key, replayed without materialising it.

Shapes: W window rows, S keys, N = S - W prefix keys, H query heads, K KV heads, G = H / K, R = G * W folded rows,
D head dim, T keys of a tile.

Attention kernels return outputs, not probabilities. But softmax(s) = exp(s - lse), so one pass over the keys gives the
log-sum-exp (or the kernel supplies it) and a second pass the probabilities, which are reduced at once. Memory is one
tile, never [H, W, S]; work is a thin matrix product per pass, W / S of the layer's own attention each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Measured on CPU: a tile of scores that stays in the L2 cache halves the time of one that does not.
TILE = 512


class Spread(NamedTuple):
    """How a window's attention varies. variance_KN: fp32, the unbiased variance over the W rows, summed over the
    group's heads. entropy: of the attention on prefix keys, in nats, summed over all heads and rows."""

    variance_KN: Tensor
    entropy: float


def window_lse(q_WHD: Tensor, k_KSD: Tensor, scale: float, *, tile: int = TILE) -> Tensor:
    """fp32 [W, H]: natural log of the sum of exp(scale * q.k) over the keys a row sees.

    Row i is token S - W + i and sees keys 0 .. S - W + i. Needs 1 <= W <= S, here and below."""
    tiles = _tiles(q_WHD, k_KSD, scale, tile)
    # Every row sees key 0, so its running maximum is finite from the first tile on.
    max_KR1 = tiles.q_KRD.new_full((*tiles.q_KRD.shape[:2], 1), -torch.inf)
    sum_KR1 = torch.zeros_like(max_KR1)
    for _, scores_KRT in tiles.up_to(k_KSD.shape[1]):
        new_max_KR1 = torch.maximum(max_KR1, scores_KRT.amax(dim=-1, keepdim=True))
        sum_KR1.mul_((max_KR1 - new_max_KR1).exp_())
        sum_KR1.add_(scores_KRT.sub_(new_max_KR1).exp_().sum(dim=-1, keepdim=True))
        max_KR1 = new_max_KR1
    return _unfold(sum_KR1.log_().add_(max_KR1), q_WHD.shape[0])


def window_mass(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None = None, *, tile: int = TILE
) -> Tensor:
    """Mass fp32 [K, S]: softmax(scale * q.k) under the causal mask, summed over the W rows and the group's G heads.

    Each KV head's masses add up to W * G. `lse_WH`, if known, saves a pass. Accumulates in fp32 whatever the dtype."""
    lse_WH = window_lse(q_WHD, k_KSD, scale, tile=tile) if lse_WH is None else lse_WH
    lse_KR1 = _fold(lse_WH.unsqueeze(-1), k_KSD.shape[0])
    mass_KS = lse_KR1.new_empty(k_KSD.shape[:2])
    for start, scores_KRT in _tiles(q_WHD, k_KSD, scale, tile).up_to(k_KSD.shape[1]):
        weights_KRT = scores_KRT.sub_(lse_KR1).exp_()
        torch.sum(weights_KRT, dim=1, out=mass_KS[:, start : start + weights_KRT.shape[2]])
    return mass_KS


def window_spread(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None = None, *, tile: int = TILE
) -> Spread:
    """The attention's variance and entropy over the prefix; a single row varies by nothing."""
    lse_WH = window_lse(q_WHD, k_KSD, scale, tile=tile) if lse_WH is None else lse_WH
    num_heads, num_rows = k_KSD.shape[0], q_WHD.shape[0]
    lse_KR1 = _fold(lse_WH.unsqueeze(-1), num_heads)
    variance_KN = lse_KR1.new_empty(num_heads, k_KSD.shape[1] - num_rows)
    entropy = torch.zeros((), dtype=torch.float64, device=k_KSD.device)
    for start, scores_KRT in _tiles(q_WHD, k_KSD, scale, tile).up_to(variance_KN.shape[1]):
        log_KRT = scores_KRT.sub_(lse_KR1)
        weights_KRT = log_KRT.exp()
        entropy -= log_KRT.mul_(weights_KRT).sum()
        weights_KGWT = weights_KRT.view(num_heads, -1, num_rows, weights_KRT.shape[2])
        # Squares of differences, not a difference of squares: attention that hardly varies would drown in rounding.
        weights_KGWT -= weights_KGWT.mean(dim=2, keepdim=True)
        variance_KN[:, start : start + weights_KRT.shape[2]] = weights_KRT.square_().sum(dim=1)
    # Rounding takes the entropy of attention to a single key below zero.
    return Spread(variance_KN.div_(max(1, num_rows - 1)), max(0.0, entropy.item()))


def _fold(x_WHD: Tensor, num_kv_heads: int) -> Tensor:
    """[W, H, D] -> fp32 [K, G * W, D]: the heads that share keys become rows of one matrix product."""
    window, num_heads, last = x_WHD.shape
    x_WKGD = x_WHD.float().reshape(window, num_kv_heads, num_heads // num_kv_heads, last)
    return x_WKGD.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, last)


def _unfold(x_KR1: Tensor, window: int) -> Tensor:
    """[K, G * W, 1] -> [W, H]."""
    return x_KR1.reshape(-1, window).T


def _tiles(q_WHD: Tensor, k_KSD: Tensor, scale: float, width: int) -> _Tiles:
    assert 1 <= q_WHD.shape[0] <= k_KSD.shape[1], (q_WHD.shape, k_KSD.shape)
    return _Tiles(_fold(q_WHD, k_KSD.shape[0]) * scale, k_KSD, q_WHD.shape[0], width)


class _Tiles:
    """Masked scores of one tile of keys at a time, in one buffer that every tile overwrites."""

    def __init__(self, q_KRD: Tensor, k_KSD: Tensor, window: int, width: int) -> None:
        self.q_KRD, self._k_KSD, self._window, self._width = q_KRD, k_KSD, window, width
        num_scores = q_KRD.shape[0] * q_KRD.shape[1] * min(width, k_KSD.shape[1])
        self._buffer = q_KRD.new_empty(num_scores)

    def up_to(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first key, scores [K, R, T], -inf where a row may not look) of all keys before `end`. Scores are the
        reader's to change, and valid until the next are asked for."""
        for start in range(0, end, self._width):
            yield start, self._scores(start, min(start + self._width, end))

    def _scores(self, start: int, end: int) -> Tensor:
        num_heads, num_rows, _ = self.q_KRD.shape
        scores_KRT = self._buffer[: num_heads * num_rows * (end - start)].view(num_heads, num_rows, end - start)
        torch.bmm(self.q_KRD, self._k_KSD[:, start:end].float().transpose(1, 2), out=scores_KRT)
        first_row = self._k_KSD.shape[1] - self._window
        if end - 1 > first_row:
            self._hide_future(scores_KRT, start, first_row)
        return scores_KRT

    def _hide_future(self, scores_KRT: Tensor, start: int, first_row: int) -> None:
        num_heads, _, num_keys = scores_KRT.shape
        row_W1 = torch.arange(first_row, first_row + self._window, device=scores_KRT.device).unsqueeze(1)
        key_T = torch.arange(start, start + num_keys, device=scores_KRT.device)
        scores_KRT.view(num_heads, -1, self._window, num_keys).masked_fill_(key_T > row_W1, -torch.inf)
