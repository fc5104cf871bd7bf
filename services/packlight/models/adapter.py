"""Decoder-only models of `transformers`, with attention handed out to a sink.

transformers lets a model's attention be replaced by a registered function ("attention interface", since 4.48). Ours is
stateless: the batch travels as a keyword argument of `forward`, through every layer, to the function. Requests are laid
one after the other in a batch of one row; explicit positions and the sink keep them apart, so there is no mask, no
padding and no cache of transformers'.

Knows transformers. Does not know pages. What it relies on is proven when a model is loaded (`_prove`).

Legend: T tokens of the flat batch, H query heads, K KV heads, D head dim, R rows wanted, V vocabulary; 1 is the batch
row that transformers insists on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink
from packlight.models.dummy_tensors import dummy_tensor
from packlight.models.folder import ModelFolder, read_json
from packlight.models.support import refuse_unsupported

ATTENTION_NAME = "packlight"

# What models hand to attention beyond q, k, v, scale and window, and what a sink would silently leave out.
_CHANGES_ATTENTION = frozenset({"s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices"})
_PROOF_TOKENS = 3


class TransformersModel:
    """A `LanguageModel` around a transformers causal LM that was loaded with our attention."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self._model = model

    @torch.inference_mode()
    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            logits_to_keep=logits_at_R,
            packlight_batch=batch,
        )
        logits_1RV: Tensor = output.logits
        return logits_1RV[0].float()


def load_transformers_model(
    folder: ModelFolder,
    spec: ModelSpec,
    *,
    device: str,
    on_progress: Callable[[str], None],
    num_ranks: int = 1,
    make: Callable[[ModelFolder, ModelSpec, str], Any] | None = None,
) -> TransformersModel:
    """See `packlight.models.base.load_model`. `make(folder, spec, device)` is who reads or draws the weights; it may
    keep a part of each matrix, so that attention sees 1 / `num_ranks` of the heads."""
    refuse_unsupported(read_json(folder.path / "config.json"), where=str(folder.path))
    transformers.AttentionInterface.register(ATTENTION_NAME, attend)
    on_progress(f"loading the weights of {folder.name} in {spec.dtype}")
    with _explained(folder), _no_progress_bars():
        model = (make or _make)(folder, spec, device)
        loaded = TransformersModel(model.eval().to(device), spec)
        _prove(loaded, config=model.config, device=device, num_ranks=num_ranks)
    return loaded


def _make(folder: ModelFolder, spec: ModelSpec, device: str) -> Any:
    return _dummy(folder, spec, device) if folder.is_dummy else read_model(model_class(folder), folder.path, spec)


def read_model(found: Any, path: Path | None, spec: ModelSpec, **options: Any) -> Any:
    """A model of the class `found` with the weights at `path`, in the host's memory; `options` are further ones of
    transformers' `from_pretrained`. Raises ModelError if weights are missing or have other shapes."""
    model, report = found.from_pretrained(
        path,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=ATTENTION_NAME,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, with their names
        **options,
    )
    _require_complete(report)
    return model


def _dummy(folder: ModelFolder, spec: ModelSpec, device: str) -> Any:
    """Made where it is used: a model of many gigabytes never passes through the host."""
    dtype = getattr(torch, spec.dtype)
    with torch.device(device):
        model = undrawn_model(folder, spec)
    for name, parameter in model.named_parameters():
        parameter.data = dummy_tensor(name, parameter.shape, dtype, device)
    model.tie_weights()
    return model


def undrawn_model(folder: ModelFolder, spec: ModelSpec) -> Any:
    """The model of a folder without weights, on torch's default device."""
    config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
    dtype = getattr(torch, spec.dtype)
    return model_class(folder)._from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)


def attend(
    module: torch.nn.Module,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packlight_batch: AttentionSink | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: `out_1THD`, and no attention weights. All state is in `packlight_batch`."""
    if packlight_batch is None:
        raise ModelError("the model class does not pass keyword arguments down to its attention")
    if extras.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelError("its attention looks ahead")
    unsupported = [name for name in _CHANGES_ATTENTION & extras.keys() if extras[name] is not None]
    if attention_mask is not None or unsupported:
        raise ModelError(f"its attention needs more than q, k and v: {unsupported or 'a mask of its own'}")
    out_THD = packlight_batch.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        q_1HTD[0].transpose(0, 1),
        k_1KTD[0].transpose(0, 1),
        v_1KTD[0].transpose(0, 1),
        scale=scaling if scaling is not None else q_1HTD.shape[-1] ** -0.5,
        sliding_window=sliding_window,
    )
    return out_THD[None], None


class _Probe:
    """A sink that answers zeros and writes down how it was called."""

    def __init__(self, spec: ModelSpec, num_heads: int, num_ranks: int) -> None:
        kv_shape = (_PROOF_TOKENS, spec.num_kv_heads // num_ranks, spec.head_dim)
        self._expected = [(_PROOF_TOKENS, num_heads // num_ranks, spec.head_dim), kv_shape, kv_shape]
        self._rule = "config.json says" if num_ranks == 1 else f"config.json, in {num_ranks} ranks, says"
        self.windows: dict[int, int | None] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        shapes = [tuple(tensor.shape) for tensor in (q_THD, k_TKD, v_TKD)]
        if shapes != self._expected:
            raise ModelError(f"layer {layer} attends with q, k, v of {shapes}; {self._rule} {self._expected}")
        if layer in self.windows:
            raise ModelError(f"layer {layer} attends more than once")
        self.windows[layer] = sliding_window
        return torch.zeros_like(q_THD)


def _prove(model: TransformersModel, *, config: Any, device: str, num_ranks: int) -> None:
    """Run three tokens and see that every layer attends once, with the heads and the window that the spec promises."""
    spec, probe = model.spec, _Probe(model.spec, config.num_attention_heads, num_ranks)
    tokens_T = torch.arange(_PROOF_TOKENS, device=device)
    logits_RV = model.forward(tokens_T, tokens_T, probe, tokens_T[-1:])
    if list(probe.windows) != list(range(spec.num_layers)):
        raise ModelError(f"layers {list(probe.windows)} attend, in this order; {spec.num_layers} were expected")
    if tuple(logits_RV.shape) != (1, spec.vocab_size):
        raise ModelError(f"one row of {spec.vocab_size} logits was wanted, {tuple(logits_RV.shape)} came")
    used = tuple(probe.windows.values())
    if used != spec.sliding_windows:
        raise ModelError(f"its layers attend with windows {used}, config.json was read as {spec.sliding_windows}")
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    slides = "sliding_attention" in layer_types and getattr(config, "sliding_window", None)
    if slides and not any(used):
        raise ModelError(f"sliding_window {slides} does not reach its attention (if it has no use for it, unset it)")


def model_class(folder: ModelFolder) -> Any:
    """transformers' class for `folder`. Raises ModelError if it has none that our attention fits into."""
    config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise ModelError(f"transformers {transformers.__version__} has no causal LM of type {config.model_type!r}")
    found = getattr(transformers, name)
    if not found.is_backend_compatible():
        raise ModelError(f"{name} does not use the attention interface of transformers {transformers.__version__}")
    if getattr(found, "_is_stateful", False):
        raise ModelError(f"{name} keeps a recurrent state beside K and V")
    return found


def _require_complete(report: Any) -> None:
    """transformers fills missing weights with random numbers and warns; here that is an error."""
    missing, mismatched = report["missing_keys"], report["mismatched_keys"]
    if missing or mismatched:
        first = sorted(map(str, missing or mismatched))[0]
        raise ModelError(f"{len(missing)} weights are missing and {len(mismatched)} have other shapes, first {first}")


@contextmanager
def _explained(folder: ModelFolder) -> Iterator[None]:
    """Whatever goes wrong while a model is loaded, say which model it was."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{folder.path}: cannot be served: {error.message}. Choose another model") from None
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"{folder.path}: transformers cannot load it: {reason}") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars on stderr, where a server logs."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
