"""The tensors of a Llama-like checkpoint, merged as the fused lane multiplies them.

Knows safetensors files and Hugging Face names. Does not compute with what it reads.

Legend: C hidden size, I intermediate size, H query heads, K KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from packlight.models.dummy_tensors import dummy_tensor
from packlight.models.folder import ModelFolder, safetensors_header, weight_files
from packlight.models.fused.shape import Shape


@dataclass(frozen=True, slots=True)
class Matrix:
    """`weight` `[outputs, inputs]`, `bias` `[outputs]` or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` is q, k and v one above the other, `[(H + 2K) * D, C]`; `gate_up` is gate above up, `[2I, C]`."""

    attention_norm_C: Tensor
    mlp_norm_C: Tensor
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


class Checkpoint:
    """The weights of one model folder, read when asked for, in `dtype` on `device`."""

    def __init__(self, folder: ModelFolder, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._readers: dict[str, Any] = {
            name: reader
            for file in weight_files(folder.path)
            for reader in (safe_open(file, "pt"),)
            for name in safetensors_header(file)
        }

    def embedding(self) -> Tensor:
        """`[V, C]`."""
        return self._read("model.embed_tokens.weight")

    def final_norm(self) -> Tensor:
        """`[C]`."""
        return self._read("model.norm.weight")

    def head(self) -> Tensor | None:
        """`[V, C]`, or None where the embedding is the head."""
        return None if self._shape.ties_embeddings else self._read("lm_head.weight")

    def layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        has_qk_norm = self._shape.has_qk_norm
        return LayerWeights(
            attention_norm_C=self._read(f"{prefix}input_layernorm.weight"),
            mlp_norm_C=self._read(f"{prefix}post_attention_layernorm.weight"),
            q_norm_D=self._read(f"{prefix}self_attn.q_norm.weight") if has_qk_norm else None,
            k_norm_D=self._read(f"{prefix}self_attn.k_norm.weight") if has_qk_norm else None,
            qkv=_stacked(*(self._matrix(f"{prefix}self_attn.{name}_proj") for name in "qkv")),
            out=self._matrix(f"{prefix}self_attn.o_proj"),
            gate_up=_stacked(*(self._matrix(f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))),
            down=self._matrix(f"{prefix}mlp.down_proj"),
        )

    def _matrix(self, name: str) -> Matrix:
        module = name.split(".", 3)[-1]  # after "model.layers.<index>."
        bias = self._read(f"{name}.bias") if module in self._shape.biased else None
        return Matrix(self._read(f"{name}.weight"), bias)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._readers[name].get_tensor(name)
        return tensor.to(device=self._device, dtype=self._dtype)


class DummyCheckpoint(Checkpoint):
    """The same for a folder without weights: they are drawn."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._shapes = shape.tensors()

    def _read(self, name: str) -> Tensor:
        return dummy_tensor(name, self._shapes[name], self._dtype, self._device)


def _stacked(*matrices: Matrix) -> Matrix:
    """One above the other: what multiplies the same input is multiplied at once."""
    weight = torch.cat([matrix.weight for matrix in matrices])
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    assert len(biases) in (0, len(matrices)), "a part of a stack has a bias, another has none"
    return Matrix(weight, torch.cat(biases) if biases else None)
