"""GGUF architectures in Hugging Face terms: the `config.json` of a GGUF file, and where each of its tensors goes.

Knows names and shapes. Does not read tensor data, except the 32 or 64 numbers of `rope_freqs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from packlight.core.errors import ModelError
from packlight.models.gguf.reader import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MAY_HAVE_BIAS = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})


@dataclass(frozen=True, slots=True)
class Architecture:
    """`permutes_qk`: llama.cpp reorders the rows of q and k for its interleaved RoPE; they must be put back."""

    model_type: str
    class_name: str
    permutes_qk: bool = False
    layer_modules: Mapping[str, str] = field(default_factory=lambda: dict(_LAYER_MODULES))


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permutes_qk=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", layer_modules={**_LAYER_MODULES, **_QK_NORMS}),
}


def architecture_of(gguf: GGUFFile) -> Architecture:
    """Raises ModelError for an architecture, or a variant of one, that this file does not know."""
    name = gguf.require("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{gguf.path}: GGUF architecture {name!r} is not supported (supported: {', '.join(ARCHITECTURES)}). "
            "Use the model's safetensors folder instead"
        )
    if int(gguf.metadata.get("split.count", 0)) > 1:
        raise ModelError(f"{gguf.path}: one part of a split GGUF. Join the parts first (llama-gguf-split --merge)")
    if int(gguf.metadata.get(f"{name}.expert_count", 0)) > 0:
        raise ModelError(f"{gguf.path}: mixture-of-experts GGUF is not supported. Use the model's safetensors folder")
    return ARCHITECTURES[name]


def tensor_names(gguf: GGUFFile, architecture: Architecture) -> dict[str, str]:
    """GGUF name -> Hugging Face name, of every tensor. Raises ModelError if one has no place, or is missing."""
    names: dict[str, str] = {}
    for name in gguf.tensors:
        if name == ROPE_FACTORS:
            continue
        target = _target(name, architecture)
        if target is None:
            raise ModelError(f"{gguf.path}: tensor {name} has no place in a {architecture.model_type} model")
        names[name] = target
    missing = _required(architecture, _number(gguf, "block_count")) - names.keys()
    if missing:
        raise ModelError(f"{gguf.path}: {len(missing)} tensors are missing, such as {min(missing)}. Download it again")
    return names


def hf_config(gguf: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """The `config.json` that transformers reads."""
    heads = _number(gguf, "attention.head_count")
    head_dim = _number(gguf, "attention.key_length", default=_number(gguf, "embedding_length") // heads)
    _require_plain_heads(gguf, head_dim)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": _number(gguf, "embedding_length"),
        "num_hidden_layers": _number(gguf, "block_count"),
        "intermediate_size": _number(gguf, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(gguf, "attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(gguf.require(_key(gguf, "attention.layer_norm_rms_epsilon"))),
        "max_position_embeddings": _number(gguf, "context_length"),
        "rope_parameters": _rope(gguf, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _target(name: str, architecture: Architecture) -> str | None:
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    match name.split("."):
        case ["blk", layer, module, kind] if module in architecture.layer_modules:
            if kind == "weight" or (kind == "bias" and module in _MAY_HAVE_BIAS):
                return f"model.layers.{layer}.{architecture.layer_modules[module]}.{kind}"
    return None


def _required(architecture: Architecture, num_layers: int) -> set[str]:
    layers = {f"blk.{layer}.{module}.weight" for layer in range(num_layers) for module in architecture.layer_modules}
    return layers | {"token_embd.weight", "output_norm.weight"}


def _key(gguf: GGUFFile, name: str) -> str:
    return f"{gguf.require('general.architecture')}.{name}"


def _number(gguf: GGUFFile, name: str, *, default: int | None = None) -> int:
    value = gguf.metadata.get(_key(gguf, name), default)
    if value is None:
        value = gguf.require(_key(gguf, name))
    if not isinstance(value, int):
        raise ModelError(f"{gguf.path}: {_key(gguf, name)} is {value!r}, and all layers must be alike: one integer")
    return value


def _require_plain_heads(gguf: GGUFFile, head_dim: int) -> None:
    for name in ("attention.value_length", "rope.dimension_count"):
        value = _number(gguf, name, default=head_dim)
        if value != head_dim:
            raise ModelError(f"{gguf.path}: {_key(gguf, name)} is {value}, not the head size {head_dim}: not supported")


def _rope(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`. llama.cpp stores Llama 3's scaling as factors, so it is recognised by them."""
    theta = _shortest(gguf.metadata.get(_key(gguf, "rope.freq_base"), 10000.0))
    scaling = gguf.metadata.get(_key(gguf, "rope.scaling.type"), "none")
    factor = _shortest(gguf.metadata.get(_key(gguf, "rope.scaling.factor"), 1.0))
    if ROPE_FACTORS in gguf.tensors:
        return {"rope_theta": theta, **_llama3(gguf, theta, head_dim)}
    if scaling == "none" or (scaling == "linear" and factor == 1.0):
        return {"rope_theta": theta, "rope_type": "default"}
    if scaling == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if scaling == "yarn":
        original = _number(gguf, "rope.scaling.original_context_length")
        return {
            "rope_theta": theta,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise ModelError(f"{gguf.path}: RoPE scaling {scaling!r} is not supported (linear, yarn and Llama 3's are)")


def _llama3(gguf: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    stored = gguf.load(ROPE_FACTORS)
    guess = {"factor": round(float(stored.max()), 3), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 8192
    if not np.allclose(stored, _llama3_factors(theta, head_dim, original, **guess), rtol=1e-4):
        raise ModelError(f"{gguf.path}: its RoPE factors are not Llama 3's. Use the model's safetensors folder instead")
    return {"rope_type": "llama3", "original_max_position_embeddings": original, **guess}


def _llama3_factors(
    theta: float, head_dim: int, original: int, *, factor: float, low_freq_factor: float, high_freq_factor: float
) -> Any:
    """By how much each frequency is slowed: not at all for short waves, by `factor` for long ones (Llama 3.1)."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clip(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _shortest(value: float) -> float:
    """1e-05, not 9.999999747378752e-06: the decimal that the 32-bit value was rounded from."""
    return float(str(np.float32(value)))
