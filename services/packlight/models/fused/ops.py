"""What a Llama-like layer computes between its matrix products and attention, in three operations, each one kernel on a
GPU.

Knows which of them are computed how: by Triton's kernels (`layer_kernels.py`) where there are a GPU and Triton, else by
torch. Torch's are the twins that tests hold the kernels against. Both compute in float32 inside an operation and round
to the model's dtype at the same places, so they differ by the order of sums and by how a library rounds an exponential.
(Triton rather than FlashInfer's norms and rotations: see `attention/flashinfer/ops.py`.)

Legend: T tokens of the flat batch, C hidden size, I intermediate size, H query heads, K KV heads, D head dim,
E = D / 2, X numbers of a token.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.models.fused.rotary import rotate


class Turn(NamedTuple):
    """How queries and keys are made ready: a norm of each head if it has weights, then a turn by its position."""

    cosines_TE: Tensor
    sines_TE: Tensor
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    epsilon: float


class LayerOps(Protocol):
    def add_norm(
        self, hidden_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`hidden + delta`, rounded, and its RMS norm (arXiv 1910.07467)."""
        ...

    def turn(self, qkv_TX: Tensor, num_heads: int, num_kv_heads: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """q `[T, H, D]` and k `[T, K, D]` made ready for attention, and v `[T, K, D]`, of `[T, (H + 2K) * D]`."""
        ...

    def gate(self, gate_up_TX: Tensor) -> Tensor:
        """`silu(gate) * up`, `[T, I]`, out of gate beside up, `[T, 2I]`."""
        ...


def layer_ops(device: str) -> LayerOps:
    """The fastest there are."""
    if torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is None:
        return TorchLayerOps()
    compiled: LayerOps = importlib.import_module("packlight.models.fused.layer_kernels").TritonLayerOps()
    return compiled


class TorchLayerOps:
    """The twins."""

    def add_norm(
        self, hidden_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        if delta_TC is not None:
            hidden_TC = hidden_TC + delta_TC
        return hidden_TC, _norm(hidden_TC, weight_C, epsilon)

    def turn(self, qkv_TX: Tensor, num_heads: int, num_kv_heads: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        heads = [num_heads, num_kv_heads, num_kv_heads]
        q_THD, k_TKD, v_TKD = torch.split(qkv_TX.view(len(qkv_TX), sum(heads), -1), heads, dim=1)
        if turn.q_norm_D is not None and turn.k_norm_D is not None:
            q_THD, k_TKD = (_norm(x, w, turn.epsilon) for x, w in ((q_THD, turn.q_norm_D), (k_TKD, turn.k_norm_D)))
        cosines_TE, sines_TE = turn.cosines_TE, turn.sines_TE
        return rotate(q_THD, cosines_TE, sines_TE), rotate(k_TKD, cosines_TE, sines_TE), v_TKD

    def gate(self, gate_up_TX: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
        return F.silu(gate_TI) * up_TI


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)
