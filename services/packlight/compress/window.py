"""Attention that the last rows of a prompt pay to every key, replayed without materialising it.

Shapes: W window rows, S keys, N = S - W prefix keys, H query heads, K KV heads, G = H / K, R = G * W folded rows of one
KV head, M of them at a time, D head dim, T keys of a tile.

Attention kernels return outputs, not probabilities, so the scores are computed again, one KV head and one tile of
keys at a time. Each tile is weighed against its own maximum (the online softmax, arXiv 1805.02867) and kept until the
rows' log-sum-exp is known: then one matrix-vector product per tile corrects and sums it. That is one matrix product and
one exponential per score. Memory is the weights of the rows in hand, about `MAX_SCORES`, never [H, W, S].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Measured on CPU: wide enough for a good matrix product, small enough that its scores stay in the L2 cache. Rows are
# taken together until their weights fill MAX_SCORES; fewer than MIN_ROWS make a poor product.
TILE = 2048
MAX_SCORES, MIN_ROWS = 2**22, 32
# Below any score, and finite: a tile of which a row sees nothing then has the weight 0 and not NaN.
LEAST = -1e30


class WindowAttention(NamedTuple):
    """mass_KS: fp32, softmax(scale * q.k) under the causal mask, summed over the W rows and the group's G heads; the
    masses of a KV head add up to W * G. lse_WH: fp32, natural log of the sum of exp(scale * q.k) over the keys a row
    sees."""

    mass_KS: Tensor
    lse_WH: Tensor


class StoredWindow(Protocol):
    """Who works the attention out over keys that lie in a pool."""

    def attend(
        self, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor | None = None
    ) -> WindowAttention:
        """Of the first `num_tokens` tokens of `blocks`, int64, the last W of which `q_WHD` belongs to. `lse_WH`, if
        known, is believed, and saves work."""
        ...


class Spread(NamedTuple):
    """How a window's attention varies. variance_KN: fp32, the unbiased variance over the W rows, summed over the
    group's heads. entropy: of the attention on prefix keys, in nats, summed over all heads and rows."""

    variance_KN: Tensor
    entropy: float


def window_attention(q_WHD: Tensor, k_KSD: Tensor, scale: float, *, tile: int = TILE) -> WindowAttention:
    """The window's mass and its log-sum-exp, in one pass. Accumulates in fp32 whatever the dtype.

    Row i is token S - W + i and sees keys 0 .. S - W + i. Needs 1 <= W <= S, here and below."""
    q_KRD = _fold(q_WHD, k_KSD.shape[0]) * scale
    lse_KR = q_KRD.new_empty(q_KRD.shape[:2])
    mass_KS = q_KRD.new_zeros(k_KSD.shape[:2])
    num_rows = min(max(MIN_ROWS, MAX_SCORES // k_KSD.shape[1]), q_KRD.shape[1])
    buffer = q_KRD.new_empty(num_rows * k_KSD.shape[1])
    for head, (q_RD, k_SD) in enumerate(zip(q_KRD, k_KSD, strict=True)):
        for start in range(0, q_RD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            lse_KR[head, rows] = _add_mass(_Tiles(q_RD, rows, k_SD, q_WHD.shape[0], tile), mass_KS[head], buffer)
    return WindowAttention(mass_KS, lse_KR.view(-1, q_WHD.shape[0]).T)


def attention_given(q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None) -> WindowAttention:
    """`window_attention`, with less work where the log-sum-exp is known."""
    if lse_WH is None:
        return window_attention(q_WHD, k_KSD, scale)
    return WindowAttention(window_mass(q_WHD, k_KSD, scale, lse_WH), lse_WH)


def window_lse(q_WHD: Tensor, k_KSD: Tensor, scale: float, *, tile: int = TILE) -> Tensor:
    """fp32 [W, H]: see `WindowAttention`."""
    return window_attention(q_WHD, k_KSD, scale, tile=tile).lse_WH


def window_mass(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None = None, *, tile: int = TILE
) -> Tensor:
    """fp32 [K, S]: see `WindowAttention`. `lse_WH`, if known, saves the search for maxima, and the memory."""
    if lse_WH is None:
        return window_attention(q_WHD, k_KSD, scale, tile=tile).mass_KS
    mass_KS = lse_WH.new_empty(k_KSD.shape[:2], dtype=torch.float32)
    for head, tiles, lse_R in _heads(q_WHD, k_KSD, scale, lse_WH, tile):
        for start, scores_TR in tiles.up_to(k_KSD.shape[1]):
            weights_TR = scores_TR.sub_(lse_R).exp_()
            torch.sum(weights_TR, dim=1, out=mass_KS[head, start : start + len(weights_TR)])
    return mass_KS


def window_spread(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor | None = None, *, tile: int = TILE
) -> Spread:
    """The attention's variance and entropy over the prefix; a single row varies by nothing."""
    lse_WH = window_lse(q_WHD, k_KSD, scale, tile=tile) if lse_WH is None else lse_WH
    window = q_WHD.shape[0]
    variance_KN = lse_WH.new_empty(k_KSD.shape[0], k_KSD.shape[1] - window, dtype=torch.float32)
    entropy = torch.zeros((), dtype=torch.float64, device=k_KSD.device)
    for head, tiles, lse_R in _heads(q_WHD, k_KSD, scale, lse_WH, tile):
        for start, scores_TR in tiles.up_to(variance_KN.shape[1]):
            log_TR = scores_TR.sub_(lse_R)
            weights_TR = log_TR.exp()
            entropy -= log_TR.mul_(weights_TR).sum()
            weights_TGW = weights_TR.view(len(weights_TR), -1, window)
            # Squares of differences, not a difference of squares: attention that hardly varies would drown in rounding.
            weights_TGW -= weights_TGW.mean(dim=2, keepdim=True)
            torch.sum(weights_TR.square_(), dim=1, out=variance_KN[head, start : start + len(weights_TR)])
    # Rounding takes the entropy of attention to a single key below zero.
    return Spread(variance_KN.div_(max(1, window - 1)), max(0.0, entropy.item()))


def _fold(x_WHD: Tensor, num_kv_heads: int) -> Tensor:
    """[W, H, D] -> fp32 [K, G * W, D]: the heads that share keys become rows of one matrix product."""
    window, num_heads, last = x_WHD.shape
    x_WKGD = x_WHD.float().reshape(window, num_kv_heads, num_heads // num_kv_heads, last)
    return x_WKGD.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, last)


def _heads(
    q_WHD: Tensor, k_KSD: Tensor, scale: float, lse_WH: Tensor, tile: int
) -> Iterator[tuple[int, _Tiles, Tensor]]:
    """(KV head, its scores, the log-sum-exp [R] of its rows) of one after another."""
    q_KRD = _fold(q_WHD, k_KSD.shape[0]) * scale
    lse_KR = _fold(lse_WH.unsqueeze(-1), k_KSD.shape[0]).squeeze(-1)
    for head, (q_RD, k_SD, lse_R) in enumerate(zip(q_KRD, k_KSD, lse_KR, strict=True)):
        yield head, _Tiles(q_RD, slice(None), k_SD, q_WHD.shape[0], tile), lse_R


def _add_mass(tiles: _Tiles, mass_S: Tensor, buffer: Tensor) -> Tensor:
    """Adds what some rows of one KV head attend to; fp32 [M], their log-sum-exp. Their weights lie in `buffer`."""
    num_keys, starts, kept, peaks, sums = len(mass_S), [], [], [], []
    for start, scores_TM in tiles.up_to(num_keys, buffer):
        peaks.append(scores_TM.amax(dim=0).clamp_(min=LEAST))
        kept.append(scores_TM.sub_(peaks[-1]).exp_())
        sums.append(kept[-1].sum(dim=0))
        starts.append(start)
    peak_nM = torch.stack(peaks)
    lse_M = torch.stack(sums).log_().add_(peak_nM).logsumexp(dim=0)
    for start, weights_TM, factor_M in zip(starts, kept, peak_nM.sub_(lse_M).exp_(), strict=True):
        mass_S[start : start + len(weights_TM)].addmv_(weights_TM, factor_M)
    return lse_M


class _Tiles:
    """Masked scores of some rows of one KV head, one tile of keys at a time."""

    def __init__(self, q_RD: Tensor, rows: slice, k_SD: Tensor, window: int, width: int) -> None:
        assert 1 <= window <= len(k_SD), (window, len(k_SD))
        self.q_MD, self._k_SD, self._width = q_RD[rows], k_SD, width
        self._first_row = len(k_SD) - window
        row_R = torch.arange(len(q_RD), device=q_RD.device) % window
        self._last_seen_M = (row_R + self._first_row)[rows]

    def up_to(self, end: int, buffer: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first key, scores [T, M], -inf where a row may not look) of all keys before `end`. Scores are the reader's
        to change. They lie one after another in `buffer` if there is one, else each overwrites the one before."""
        num_rows = len(self.q_MD)
        space = self.q_MD.new_empty(min(self._width, end) * num_rows) if buffer is None else buffer
        for start in range(0, end, self._width):
            stop = min(start + self._width, end)
            at = 0 if buffer is None else start * num_rows
            scores_TM = space[at : at + (stop - start) * num_rows].view(stop - start, num_rows)
            torch.mm(self._k_SD[start:stop].float(), self.q_MD.T, out=scores_TM)
            self._hide_future(scores_TM, start)
            yield start, scores_TM

    def _hide_future(self, scores_TM: Tensor, start: int) -> None:
        first = max(0, self._first_row + 1 - start)
        if first < len(scores_TM):
            key_T = torch.arange(start + first, start + len(scores_TM), device=scores_TM.device)
            scores_TM[first:].masked_fill_(key_T[:, None] > self._last_seen_M, -torch.inf)
