"""What a model folder says of its model: shape, window, ends, dtype, and the fingerprint of what it computes.

Knows `config.json` and the defaults that transformers fills in where a file is silent. Never imports torch: routers and
page books need these numbers, not the weights. The adapter proves them against the real model when it loads one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from packlight.core.config import DType, Weights
from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.folder import ModelFolder, read_json, sample_file, weight_files
from packlight.models.support import refuse_unsupported
from packlight.models.tokenizer import ChatTokenizer

# Only for the families whose files on the hub leave these out.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
}
_WINDOW_IS_OFF_UNLESS_SAID = ("qwen2", "qwen3", "smollm3")
_EVERY_LAYER_SLIDES = frozenset({"mistral", "mixtral", "ministral3", "phi3", "starcoder2", "qwen3_moe", "olmoe"})
_LATER_LAYERS_SLIDE = frozenset({"qwen2", "qwen3"})
_EVERY_NTH_IS_FULL = {"gemma3_text": 6, "cohere2": 4, "olmo3": 4}

_PROMPT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def load_spec(folder: str | PathLike[str], *, name: str, dtype: str, max_context: int | None = None) -> ModelSpec:
    """The spec of the model in `folder`, computing in `dtype` (see `resolve_dtype`).

    Raises ModelError for a model that cannot be served, or a `max_context` beyond what it was made for."""
    path = Path(folder)
    config = read_json(path / "config.json")
    refuse_unsupported(config, where=str(path))
    config = with_family_defaults(config)
    num_heads = _positive(config, "num_attention_heads", path)
    head_dim = config.get("head_dim") or _positive(config, "hidden_size", path) // num_heads
    return ModelSpec(
        name=name,
        fingerprint=fingerprint(path, dtype, is_dummy=isinstance(folder, ModelFolder) and folder.is_dummy),
        num_layers=_positive(config, "num_hidden_layers", path),
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size", path),
        max_context=_max_context(config, max_context, path),
        eos_token_ids=ChatTokenizer.from_folder(path).eos_token_ids,
        dtype=dtype,
        sliding_windows=sliding_windows(config),
    )


def with_family_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with what transformers assumes where it is silent. `null` is not silence: it means none."""
    return _FAMILY_DEFAULTS.get(config["model_type"], {}) | dict(config)


def fingerprint(folder: str | PathLike[str], dtype: str, *, is_dummy: bool = False) -> str:
    """32 hex digits that name what a worker computes: BLAKE2b over config, tokenizer, chat template, dtype, and each
    weight file's name, size, header and a sample of its bytes. It does not depend on the machine or the path."""
    kind = f"packlight model 1 {dtype}{' dummy' if is_dummy else ''}"
    path, hasher = Path(folder), hashlib.blake2b(kind.encode(), digest_size=16)
    for file in (path / name for name in _PROMPT_FILES):
        content = file.read_bytes() if file.is_file() else b""
        hasher.update(f"\0{file.name} {len(content)}\0".encode() + content)
    for file in [] if is_dummy else weight_files(path):
        hasher.update(f"\0{file.name}\0".encode())
        sample_file(hasher, file)
    return hasher.hexdigest()


def sliding_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per layer, how many tokens it sees (itself included), or None for all: as transformers resolves a config.json.

    A window that the family is not known to use is ignored here; the adapter's proof at load compares."""
    family, num_layers = config["model_type"], config["num_hidden_layers"]
    enabled = config.get("use_sliding_window", not family.startswith(_WINDOW_IS_OFF_UNLESS_SAID))
    window = config.get("sliding_window") if enabled else None
    return tuple(window if window and _slides(config, layer) else None for layer in range(num_layers))


def resolve_dtype(
    dtype: DType, device: str, weights: Weights = Weights.NATIVE, *, cpuinfo: Path = Path("/proc/cpuinfo")
) -> str:
    """The torch name of the dtype to compute in. `auto` is bfloat16 where the device has arithmetic for it, or where
    weights are quantised: their kernels have."""
    if dtype is not DType.AUTO:
        return dtype.value
    fast = (
        weights not in (Weights.NATIVE, Weights.DUMMY)
        or device.startswith("cuda")
        or (device == "cpu" and _cpu_computes_in_bfloat16(cpuinfo))
    )
    return DType.BFLOAT16.value if fast else DType.FLOAT32.value


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    family, layer_types = config["model_type"], config.get("layer_types")
    if layer_types:
        return bool(layer_types[layer] == "sliding_attention")
    if family in _LATER_LAYERS_SLIDE:
        return layer >= int(config.get("max_window_layers", 28))
    if family in _EVERY_NTH_IS_FULL:
        return (layer + 1) % int(config.get("sliding_window_pattern", _EVERY_NTH_IS_FULL[family])) != 0
    return family in _EVERY_LAYER_SLIDES


def _max_context(config: Mapping[str, Any], wanted: int | None, path: Path) -> int:
    trained = _positive(config, "max_position_embeddings", path)
    if wanted is not None and wanted > trained:
        raise ModelError(f"model.max_context is {wanted}, but {path} was made for {trained} tokens. Lower or unset it")
    return wanted or trained


def _positive(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path / 'config.json'}: {key} must be a positive integer, got {value!r}")
    return value


def _cpu_computes_in_bfloat16(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", text) is not None
