"""Attention mass that all queries of a prompt put on every key, gathered chunk by chunk (H2O, arXiv 2306.14048).

Shapes: L layers, R query rows of a chunk, B rows of a block, S keys that exist by then, N tokens of the prompt, H query
heads, K KV heads, G = H / K, M = G * B, D head dim.

The column sums of the attention matrix, exactly, without the matrix: each row's softmax is complete when its chunk is
computed, because later keys are hidden from it. A block of rows sees all its keys at once, so one product serves both
the softmax and its sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block and KV head: the buffer's size. Measured on CPU: blocks of 32 to 128 rows are equally fast, fewer
# make poor matrix products, more leave the cache. An accelerator wants few launches.
CPU_BLOCK_SCORES = 2**20
DEVICE_BLOCK_SCORES = 2**26
MIN_ROWS, MAX_ROWS = 32, 128


class AccumulatedMass:
    """The sums of one request: fp32 [L, K, N], of which a layer is complete once all rows of the prompt were added.

    They do not depend on how the prompt was cut into chunks, but for the rounding of fp32 sums."""

    def __init__(self, num_layers: int, num_kv_heads: int, num_tokens: int, device: torch.device) -> None:
        self._mass_LKN = torch.zeros(num_layers, num_kv_heads, num_tokens, device=device)

    def add(self, layer: int, q_RHD: Tensor, k_KSD: Tensor, scale: float) -> None:
        """Rows R are the tokens S - R .. S - 1, and see the keys up to themselves. Any dtype; sums are fp32."""
        num_rows, num_heads, head_dim = q_RHD.shape
        num_kv_heads, num_keys = k_KSD.shape[:2]
        q_KRGD = (q_RHD.float() * scale).reshape(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
        k_KSD = k_KSD.float()
        size = _block_rows(num_rows, num_heads // num_kv_heads * num_keys, q_RHD.device)
        buffer = k_KSD.new_empty(size * num_heads // num_kv_heads * num_keys)
        for start in range(0, num_rows, size):
            end = min(start + size, num_rows)
            seen = num_keys - num_rows + end
            for head, q_RGD in enumerate(q_KRGD):
                weights_MS = _weights(q_RGD[start:end], k_KSD[head, :seen], buffer)
                self._mass_LKN[layer, head, :seen].addmv_(weights_MS.T, weights_MS.new_ones(weights_MS.shape[0]))

    def layer(self, layer: int) -> Tensor:
        """[K, N], a view."""
        return self._mass_LKN[layer]


def _block_rows(num_rows: int, scores_per_row: int, device: torch.device) -> int:
    """Rows of a block. The first rows of a chunk see fewer keys than the last, but not so few as to matter."""
    if device.type != "cpu":
        return min(max(1, DEVICE_BLOCK_SCORES // scores_per_row), num_rows)
    return min(max(MIN_ROWS, CPU_BLOCK_SCORES // scores_per_row), MAX_ROWS, num_rows)


def _weights(q_BGD: Tensor, k_SD: Tensor, buffer: Tensor) -> Tensor:
    """Attention [M, S] of the last B tokens among S keys, one KV head. It lies in `buffer`."""
    num_rows, group, head_dim = q_BGD.shape
    scores_MS = buffer[: num_rows * group * k_SD.shape[0]].view(num_rows * group, -1)
    torch.mm(q_BGD.reshape(-1, head_dim), k_SD.T, out=scores_MS)
    hidden_BB = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q_BGD.device).triu(1)
    scores_MS.view(num_rows, group, -1)[:, :, -num_rows:].masked_fill_(hidden_BB[:, None], -torch.inf)
    return torch.softmax(scores_MS, dim=-1, out=scores_MS)
