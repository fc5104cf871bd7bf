"""A Llama-like model of matrix products and a few operations between them: every device, every dtype, and on the CPU
the oracle of the compiled one.

Legend: T tokens of the flat batch, C hidden size, I intermediate size, H query heads, K KV heads, D head dim,
E = D / 2, R rows wanted, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink
from packlight.models.fused.ops import LayerOps, Turn, layer_ops
from packlight.models.fused.rotary import inverse_frequencies, turns
from packlight.models.fused.shape import Shape
from packlight.models.fused.weights import Checkpoint, LayerWeights, Matrix


class PlainModel:
    """A `LanguageModel`."""

    def __init__(
        self, checkpoint: Checkpoint, shape: Shape, spec: ModelSpec, device: str, ops: LayerOps | None = None
    ) -> None:
        """`ops` are the fastest on `device` unless others are given."""
        self.spec = spec
        self._shape, self._ops = shape, ops or layer_ops(device)
        self._frequencies_E = inverse_frequencies(shape.rope, shape.head_dim).to(device)
        self._embedding_VC, self._final_norm_C = checkpoint.embedding(), checkpoint.final_norm()
        head_VC = checkpoint.head()
        self._head_VC = self._embedding_VC if head_VC is None else head_VC
        self._layers = tuple(checkpoint.layer(index) for index in range(shape.num_layers))

    @torch.inference_mode()
    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        hidden_TC, delta_TC = F.embedding(tokens_T, self._embedding_VC), None
        cosines_TE, sines_TE = turns(positions_T, self._frequencies_E)
        for index, layer in enumerate(self._layers):
            # What a layer adds to the hidden state is added where it is next read: in one pass with the norm there.
            hidden_TC, normed_TC = self._add_norm(hidden_TC, delta_TC, layer.attention_norm_C)
            turn = Turn(cosines_TE, sines_TE, layer.q_norm_D, layer.k_norm_D, self._shape.epsilon)
            attended_TX = self._attention(index, layer, normed_TC, turn, batch)
            hidden_TC, normed_TC = self._add_norm(hidden_TC, _times(attended_TX, layer.out), layer.mlp_norm_C)
            delta_TC = _times(self._ops.gate(_times(normed_TC, layer.gate_up)), layer.down)
        delta_RC = delta_TC[logits_at_R] if delta_TC is not None else None
        _, normed_RC = self._add_norm(hidden_TC[logits_at_R], delta_RC, self._final_norm_C)
        return F.linear(normed_RC, self._head_VC).float()

    def _attention(
        self, index: int, layer: LayerWeights, normed_TC: Tensor, turn: Turn, batch: AttentionSink
    ) -> Tensor:
        """`[T, H * D]`."""
        shape = self._shape
        qkv_TX = _times(normed_TC, layer.qkv)
        q_THD, k_TKD, v_TKD = self._ops.turn(qkv_TX, shape.num_heads, shape.num_kv_heads, turn)
        window, scale = shape.sliding_windows[index], shape.head_dim**-0.5
        return batch.attend(index, q_THD, k_TKD, v_TKD, scale=scale, sliding_window=window).flatten(1)

    def _add_norm(self, hidden_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        return self._ops.add_norm(hidden_TC, delta_TC, weight_C, self._shape.epsilon)


def _times(x: Tensor, matrix: Matrix) -> Tensor:
    return F.linear(x, matrix.weight, matrix.bias)
