"""Which models can be served exactly, judged by their `config.json`.

Knows the limits of paged attention as it is done here: causal softmax attention over one K and V per token, layer and
KV head, the same heads in every layer, positions fixed by RoPE or added before the layers. Reads dictionaries only.
A model that would come out subtly wrong is refused with what, why and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from packlight.core.errors import ModelError

Config = Mapping[str, Any]

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su"})
_MULTIMODAL = ("vision_config", "audio_config", "speech_config", "video_config")
_RECURRENT = ("mamba", "rwkv", "jamba", "bamba", "zamba", "ssm", "recurrent", "lfm", "xlstm", "linear_attn")
_ALIBI_FAMILIES = frozenset({"bloom", "mpt"})


def refuse_unsupported(config: Config, *, where: str) -> None:
    """Raises ModelError, beginning with `where`, for a configuration whose attention cannot be computed exactly."""
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ModelError(f"{where}: config.json names no model_type")
    for reason in _RULES:
        found = reason(config, family)
        if found is not None:
            raise ModelError(f"{where}: {family} cannot be served: {found}. Choose a plain decoder-only text model")


def _encoder(config: Config, family: str) -> str | None:
    return "it is an encoder-decoder model" if config.get("is_encoder_decoder") else None


def _multimodal(config: Config, family: str) -> str | None:
    found = [key for key in _MULTIMODAL if config.get(key)]
    return f"it reads more than text ({found[0]})" if found else None


def _latent(config: Config, family: str) -> str | None:
    if config.get("kv_lora_rank") is None:
        return None
    return f"multi-head latent attention (kv_lora_rank {config['kv_lora_rank']}) keeps no K and V per head"


def _layer_types(config: Config, family: str) -> str | None:
    other = sorted(set(config.get("layer_types") or ()) - _LAYER_TYPES)
    if other:
        return f"it has layers of type {', '.join(map(repr, other))}, and only full and sliding attention have pages"
    if any(mark in family for mark in _RECURRENT):
        return "its recurrent layers keep a state instead of K and V"
    return None


def _sinks(config: Config, family: str) -> str | None:
    switches = ("attention_sink_bias", "add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    learned = family == "gpt_oss" or any(config.get(key) for key in switches)
    return "its softmax has learned attention sinks" if learned else None


def _softcap(config: Config, family: str) -> str | None:
    cap = config.get("attn_logit_softcapping")
    return f"its attention scores are soft-capped (attn_logit_softcapping {cap})" if cap else None


def _alibi(config: Config, family: str) -> str | None:
    return "ALiBi adds a bias to every attention score" if config.get("alibi") or family in _ALIBI_FAMILIES else None


def _rope(config: Config, family: str) -> str | None:
    for rope in _rope_settings(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in _BATCH_DEPENDENT_ROPE:
            return f"{kind} RoPE makes a token's key depend on the other requests of its batch"
    return None


def _rope_settings(config: Config) -> Iterator[Config]:
    """One setting for all layers, or one per layer type; under the old name or the new."""
    for key in ("rope_scaling", "rope_parameters"):
        setting = config.get(key)
        if isinstance(setting, Mapping):
            yield setting
            yield from (inner for inner in setting.values() if isinstance(inner, Mapping))


def _not_causal(config: Config, family: str) -> str | None:
    looks_ahead = config.get("use_bidirectional_attention") or config.get("is_causal") is False
    return "its attention looks ahead" if looks_ahead else None


def _uneven(config: Config, family: str) -> str | None:
    for key in ("num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads"):
        if isinstance(config.get(key), list):
            return f"its layers have different head counts ({key})"
    if config.get("num_kv_shared_layers"):
        return f"{config['num_kv_shared_layers']} of its layers share another layer's K and V"
    return None


_RULES: tuple[Callable[[Config, str], str | None], ...] = (
    _encoder,
    _multimodal,
    _latent,
    _layer_types,
    _sinks,
    _softcap,
    _alibi,
    _rope,
    _not_causal,
    _uneven,
)
