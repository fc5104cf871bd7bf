"""A Llama-like model in plain torch: every device, every dtype, and the oracle of the compiled one.

Legend: T tokens of the flat batch, C hidden size, I intermediate size, H query heads, K KV heads, D head dim, R rows
wanted, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink
from packlight.models.fused.rotary import inverse_frequencies, rotate, turns
from packlight.models.fused.shape import Shape
from packlight.models.fused.weights import Checkpoint, LayerWeights, Matrix


class PlainModel:
    """A `LanguageModel` of matrix products and torch's own norms."""

    def __init__(self, checkpoint: Checkpoint, shape: Shape, spec: ModelSpec, device: str) -> None:
        self.spec = spec
        self._shape = shape
        self._frequencies_E = inverse_frequencies(shape.rope, shape.head_dim).to(device)
        self._embedding_VC, self._final_norm_C = checkpoint.embedding(), checkpoint.final_norm()
        head_VC = checkpoint.head()
        self._head_VC = self._embedding_VC if head_VC is None else head_VC
        self._layers = tuple(checkpoint.layer(index) for index in range(shape.num_layers))

    @torch.inference_mode()
    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        hidden_TC = F.embedding(tokens_T, self._embedding_VC)
        cosines_TE, sines_TE = turns(positions_T, self._frequencies_E)
        for index, layer in enumerate(self._layers):
            q_THD, k_TKD, v_TKD = self._heads(layer, hidden_TC, cosines_TE, sines_TE)
            window, scale = self._shape.sliding_windows[index], self._shape.head_dim**-0.5
            out_THD = batch.attend(index, q_THD, k_TKD, v_TKD, scale=scale, sliding_window=window)
            hidden_TC = hidden_TC + _times(out_THD.flatten(1), layer.out)
            hidden_TC = hidden_TC + self._mlp(layer, hidden_TC)
        return F.linear(self._norm(hidden_TC[logits_at_R], self._final_norm_C), self._head_VC).float()

    def _heads(
        self, layer: LayerWeights, hidden_TC: Tensor, cosines_TE: Tensor, sines_TE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = self._shape
        qkv = _times(self._norm(hidden_TC, layer.attention_norm_C), layer.qkv)
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q_THD, k_TKD, v_TKD = torch.split(qkv.view(len(qkv), -1, shape.head_dim), heads, dim=1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_THD, k_TKD = self._norm(q_THD, layer.q_norm_D), self._norm(k_TKD, layer.k_norm_D)
        return rotate(q_THD, cosines_TE, sines_TE), rotate(k_TKD, cosines_TE, sines_TE), v_TKD

    def _mlp(self, layer: LayerWeights, hidden_TC: Tensor) -> Tensor:
        gate_TI, up_TI = _times(self._norm(hidden_TC, layer.mlp_norm_C), layer.gate_up).chunk(2, dim=-1)
        return _times(F.silu(gate_TI) * up_TI, layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._shape.epsilon)


def _times(x: Tensor, matrix: Matrix) -> Tensor:
    return F.linear(x, matrix.weight, matrix.bias)
