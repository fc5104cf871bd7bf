"""A Llama-like model over the compiled kernels: per layer one call and one attention, and weights in panels.

Computes in bfloat16 with float32 sums, on CPU. Rounds less often than transformers does (a norm, a turn and a gate are
rounded once each), so its logits differ from a plain bfloat16 model's by that model's own rounding errors.

Legend: T tokens of the flat batch, C hidden size, I intermediate size, H query heads, K KV heads, D head dim,
E = D / 2, R rows wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.core.config import Weights
from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink
from packlight.models.fused.packing import PackedMatrix, interleaved, packed
from packlight.models.fused.rotary import inverse_frequencies, turns
from packlight.models.fused.shape import Shape
from packlight.models.fused.weights import Checkpoint, LayerWeights, Matrix
from packlight.native.layer import Layer, LayerFunctions, Step
from packlight.native.library import Library
from packlight.native.linear import TILE_DEPTH, LinearFunctions, room_elements


def why_not_compiled(shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    """Why the kernels cannot compute this model; None: they can."""
    if device != "cpu":
        return f"device {device} (the kernels are for the CPU)"
    if dtype != torch.bfloat16:
        return f"dtype {str(dtype).removeprefix('torch.')} (they compute in bfloat16)"
    depths = {"hidden size": shape.hidden_size, "intermediate size": shape.intermediate_size}
    depths["size of all query heads"] = shape.num_heads * shape.head_dim
    odd = [f"{name} {size}" for name, size in depths.items() if size % TILE_DEPTH]
    return f"{odd[0]}, which is no multiple of {TILE_DEPTH}" if odd else None


class CompiledModel:
    """A `LanguageModel`. The weights belong to it; everything else lives for one step."""

    def __init__(
        self, checkpoint: Checkpoint, shape: Shape, spec: ModelSpec, library: Library, weights: Weights = Weights.NATIVE
    ) -> None:
        self.spec = spec
        self._shape, self._quantised = shape, weights is not Weights.NATIVE
        self._between, self._linear = LayerFunctions(library).between, LinearFunctions(library)
        self._frequencies_E = inverse_frequencies(shape.rope, shape.head_dim)
        self._final_norm_C = checkpoint.final_norm()
        self._layers = tuple(_PackedLayer.of(checkpoint.layer(index), weights) for index in range(shape.num_layers))
        # The head decides between near-equal tokens, and is read as the embedding as well: it keeps eight bits.
        head_weights = Weights.INT8 if weights is Weights.INT4 else weights
        head_VC = checkpoint.head()
        self._embedding_VC = checkpoint.embedding() if head_VC is not None else None
        self._head = packed(head_VC if head_VC is not None else checkpoint.embedding(), None, head_weights)

    @torch.inference_mode()
    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        num_threads = torch.get_num_threads()
        scratch = _Scratch(self._shape, self._embedded(tokens_T, num_threads), num_threads if self._quantised else 0)
        cosines_TE, sines_TE = turns(positions_T, self._frequencies_E)
        step = scratch.step(cosines_TE, sines_TE)
        layers = (None, *(layer.struct for layer in self._layers), None)
        scale = self._shape.head_dim**-0.5
        for index, (ended, begun) in enumerate(pairwise(layers)):
            if begun is None:
                self._between(ended, None, step, num_threads)
                break
            q_THD, k_TKD, v_TKD = scratch.heads(step)
            self._between(ended, begun, step, num_threads)
            window = self._shape.sliding_windows[index]
            out_THD = batch.attend(index, q_THD, k_TKD, v_TKD, scale=scale, sliding_window=window).contiguous()
            step.attended = out_THD.data_ptr()
        return self._logits(scratch.hidden_TC[logits_at_R], num_threads)

    def _embedded(self, tokens_T: Tensor, num_threads: int) -> Tensor:
        if self._embedding_VC is not None:
            return F.embedding(tokens_T, self._embedding_VC)
        hidden_TC = torch.empty(len(tokens_T), self._shape.hidden_size, dtype=torch.bfloat16)
        tokens_T, room = tokens_T.contiguous(), self._room(num_threads)
        self._linear.rows(
            self._head.struct, tokens_T.data_ptr(), len(tokens_T), hidden_TC.data_ptr(), _address(room), num_threads
        )
        return hidden_TC

    def _logits(self, hidden_RC: Tensor, num_threads: int) -> Tensor:
        normed_RC = F.rms_norm(hidden_RC, self._final_norm_C.shape, self._final_norm_C, self._shape.epsilon)
        logits_RV = torch.empty(len(hidden_RC), self._shape.vocab_size)
        room = self._room(num_threads)
        self._linear.multiply(
            self._head.struct, normed_RC.data_ptr(), len(hidden_RC), logits_RV.data_ptr(), _address(room), num_threads
        )
        return logits_RV

    def _room(self, num_threads: int) -> Tensor | None:
        if not self._quantised:
            return None
        return torch.empty(room_elements(self._shape.hidden_size, num_threads), dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _PackedLayer:
    """One layer, and the struct that points into it."""

    matrices: tuple[PackedMatrix, ...]
    norms: tuple[Tensor | None, ...]
    struct: Layer

    @staticmethod
    def of(layer: LayerWeights, weights: Weights) -> _PackedLayer:
        gate_up = Matrix(
            interleaved(layer.gate_up.weight),
            interleaved(layer.gate_up.bias) if layer.gate_up.bias is not None else None,
        )
        matrices = tuple(packed(m.weight, m.bias, weights) for m in (layer.qkv, layer.out, gate_up, layer.down))
        norms = tuple(
            norm.float().contiguous() if norm is not None else None
            for norm in (layer.attention_norm_C, layer.q_norm_D, layer.k_norm_D, layer.mlp_norm_C)
        )
        struct = Layer(*(_address(norm) for norm in norms), *(matrix.struct for matrix in matrices))
        return _PackedLayer(matrices, norms, struct)


class _Scratch:
    """The memory of one step. `room_threads`: how many threads need room to unpack weights into."""

    def __init__(self, shape: Shape, hidden_TC: Tensor, room_threads: int) -> None:
        self.hidden_TC = hidden_TC
        self._shape = shape
        self._num_tokens = len(hidden_TC)
        self._head_counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        qkv_size = sum(self._head_counts) * shape.head_dim
        self._normed_TC = torch.empty_like(hidden_TC)
        self._qkv = hidden_TC.new_empty(self._num_tokens, qkv_size)
        self._gated_TI = hidden_TC.new_empty(self._num_tokens, shape.intermediate_size)
        depth = max(shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim)
        self._room = hidden_TC.new_empty(room_elements(depth, room_threads))

    def step(self, cosines_TE: Tensor, sines_TE: Tensor) -> Step:
        """Points into this scratch and the two tensors; `attended`, q, k and v come with each layer."""
        shape = self._shape
        return Step(
            num_tokens=self._num_tokens,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            epsilon=shape.epsilon,
            hidden=self.hidden_TC.data_ptr(),
            normed=self._normed_TC.data_ptr(),
            qkv=self._qkv.data_ptr(),
            gated=self._gated_TI.data_ptr(),
            room=self._room.data_ptr(),
            cosines=cosines_TE.data_ptr(),
            sines=sines_TE.data_ptr(),
        )

    def heads(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the next layer, `[T, heads, D]`. New ones each time: a sink may keep them."""
        tensors = tuple(
            self.hidden_TC.new_empty(self._num_tokens, count, self._shape.head_dim) for count in self._head_counts
        )
        step.q, step.k, step.v = (tensor.data_ptr() for tensor in tensors)
        q_THD, k_TKD, v_TKD = tensors
        return q_THD, k_TKD, v_TKD


def _address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None
