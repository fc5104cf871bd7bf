"""Which way a model is computed: compiled kernels, plain torch, or `transformers`.

Knows what each of them can do. The compiled lane is the fast one on CPU, the plain one the fallback for the same
families, and whatever neither knows goes to transformers (`models/adapter.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from packlight.core.config import Weights
from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.base import LanguageModel
from packlight.models.folder import ModelFolder, read_json
from packlight.models.fused.compiled import CompiledModel, why_not_compiled
from packlight.models.fused.plain import PlainModel
from packlight.models.fused.shape import check_spec, read_shape, why_not
from packlight.models.fused.weights import Checkpoint, DummyCheckpoint
from packlight.native.compile import NativeUnavailable
from packlight.native.library import Library, open_library

_PACKED = (Weights.INT8, Weights.INT4)


def load_fused_model(
    folder: ModelFolder, spec: ModelSpec, *, device: str, weights: Weights, on_progress: Callable[[str], None]
) -> LanguageModel | None:
    """The model in `folder`, or None where it is left to transformers.

    Raises ModelError where `weights` asks for what only the compiled lane can do and it cannot."""
    config = read_json(folder.path / "config.json")
    reason = why_not(config, folder)
    if reason is not None:
        _require_native(weights, folder, reason)
        return None
    shape, dtype = read_shape(config), getattr(torch, spec.dtype)
    check_spec(shape, spec)
    library = _kernels(why_not_compiled(shape, dtype, device), weights, folder, on_progress)
    on_progress(f"loading the weights of {folder.name} in {weights if weights in _PACKED else spec.dtype}")
    is_dummy = folder.is_dummy
    checkpoint = DummyCheckpoint(shape, dtype, device) if is_dummy else Checkpoint(folder, shape, dtype, device)
    if library is None:
        return PlainModel(checkpoint, shape, spec, device)
    return CompiledModel(checkpoint, shape, spec, library, weights if weights in _PACKED else Weights.NATIVE)


def _kernels(
    reason: str | None, weights: Weights, folder: ModelFolder, on_progress: Callable[[str], None]
) -> Library | None:
    """None where the kernels have no place, or cannot be had."""
    if reason is not None:
        _require_native(weights, folder, reason)
        return None
    try:
        return open_library(on_progress=on_progress)
    except NativeUnavailable as error:
        _require_native(weights, folder, error.message)
        on_progress(f"computing in plain torch: {error.message}")
        return None


def _require_native(weights: Weights, folder: ModelFolder, reason: str) -> None:
    if weights in _PACKED:
        raise ModelError(
            f"{folder.path}: model.weights={weights} is not possible: {reason}. It needs a model of the Llama, "
            "Mistral, Qwen2 or Qwen3 family, model.device=cpu, model.dtype=bfloat16 or auto, and a C++ compiler. "
            "Set model.weights=native"
        )
