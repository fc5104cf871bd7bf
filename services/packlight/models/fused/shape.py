"""Which models the fused lane computes, and their sizes: Llama, Qwen2, Qwen3 and Mistral, judged by `config.json`.

Free of torch. What this file does not know for certain it leaves to transformers: a wrong guess would be a model that
answers subtly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.folder import ModelFolder, safetensors_header, weight_files
from packlight.models.spec import sliding_windows, with_family_defaults

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
_STORED_AS = frozenset({"F32", "BF16", "F16"})
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Shape:
    """`biased`: the projections of a layer that add a bias. `rope`: `rope_theta`, and what its type needs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    epsilon: float
    has_qk_norm: bool
    ties_embeddings: bool
    biased: tuple[str, ...]
    rope: Mapping[str, Any]
    sliding_windows: tuple[int | None, ...]

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within a layer -> shape, of everything a layer has."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = {
            "self_attn.q_proj": (q_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q_size),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
        tensors |= {f"{name}.bias": matrices[name][:1] for name in self.biased}
        tensors |= {f"{name}.weight": (self.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}
        if self.has_qk_norm:
            tensors |= {f"self_attn.{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        return tensors

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, of everything a checkpoint must hold."""
        table = (self.vocab_size, self.hidden_size)
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
        tensors["model.norm.weight"] = (self.hidden_size,)
        if not self.ties_embeddings:
            tensors["lm_head.weight"] = table
        for layer in range(self.num_layers):
            tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in self.layer_tensors().items()}
        return tensors


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The shape that a supported `config.json` means, with transformers' defaults where it is silent."""
    config = with_family_defaults(config)
    num_heads = config["num_attention_heads"]
    return Shape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        epsilon=config.get("rms_norm_eps", 1e-6),
        has_qk_norm=config["model_type"] == "qwen3",
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
        biased=_biased(config),
        rope=_rope(config),
        sliding_windows=sliding_windows(config),
    )


def why_not(config: Mapping[str, Any], folder: ModelFolder) -> str | None:
    """Why the fused lane leaves this model to transformers; None: it takes it."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"family {family}"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']}"
    if config.get("quantization_config"):
        return "a checkpoint with quantisation of its own"
    if config.get("partial_rotary_factor", 1.0) != 1.0 or _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embedding of a part of each head"
    if _rope(config)["rope_type"] not in ROPE_TYPES:
        return f"rotary embedding of type {_rope(config)['rope_type']}"
    return _why_not_weights(read_shape(config), folder)


def check_spec(shape: Shape, spec: ModelSpec) -> None:
    """Raises ModelError where `spec`, which sized the pages, is not the model that is about to be computed."""
    fields = ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "sliding_windows")
    for name in fields:
        ours, promised = getattr(shape, name), getattr(spec, name)
        if ours != promised:
            raise ModelError(f"{spec.name}: {name} is {ours} in config.json, {promised} was expected")


def _why_not_weights(shape: Shape, folder: ModelFolder) -> str | None:
    """transformers renames, repairs and explains; here a checkpoint is as it should be, or not for us."""
    if folder.is_dummy:
        return None
    stored = {name: entry for file in weight_files(folder.path) for name, entry in safetensors_header(file).items()}
    for name, wanted in shape.tensors().items():
        if name not in stored:
            return f"a checkpoint without {name}"
        if tuple(stored[name]["shape"]) != wanted:
            return f"{name} of shape {tuple(stored[name]['shape'])} where {wanted} was expected"
        if stored[name]["dtype"] not in _STORED_AS:
            return f"{name} stored as {stored[name]['dtype']}"
    return None


def _biased(config: Mapping[str, Any]) -> tuple[str, ...]:
    family = config["model_type"]
    if family == "qwen2":
        return _QKV
    attention = (*_QKV, "self_attn.o_proj") if family != "mistral" and config.get("attention_bias") else ()
    return (*attention, *(_MLP if family == "llama" and config.get("mlp_bias") else ()))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """One setting under the old names or the new, with `rope_type` and `rope_theta`."""
    setting = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    setting["rope_type"] = setting.get("rope_type") or setting.get("type") or "default"
    setting.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    setting.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return setting
