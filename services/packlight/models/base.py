"""The language-model seam: what an engine asks of a model, and what a model asks of the engine.

Knows tensors of one flat batch. Does not know pages, sequences or where K and V go: that is the sink's.

Legend: T tokens of the batch (all sequences, one after the other), H query heads, K KV heads, D head dim,
R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from packlight.core.config import Weights
from packlight.core.types import ModelSpec
from packlight.models.folder import ModelFolder


class AttentionSink(Protocol):
    """Attention of one step, for all layers: a planned batch of the attention package."""

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """`out_THD`: every token's attention over its own sequence up to itself. K comes after RoPE. With a sliding
        window of w a token sees itself and the w - 1 before it. The inputs may be views; they are not changed."""
        ...


class LanguageModel(Protocol):
    spec: ModelSpec

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        """`logits_RV` in float32, of the rows `logits_at_R` of the flat batch. Calls `batch.attend` once per layer, in
        order. `tokens_T`, `positions_T` and `logits_at_R` are int64, on the model's device."""
        ...


def load_model(
    folder: ModelFolder,
    spec: ModelSpec,
    *,
    device: str,
    weights: Weights = Weights.NATIVE,
    on_progress: Callable[[str], None],
) -> LanguageModel:
    """The model in `folder`, on `device`, computing in `spec.dtype`, and calling attention as `spec` says.

    Raises ModelError for weights that do not fit, or a model that cannot be served exactly."""
    # Those who only name the types above do not pay for the imports of those who compute.
    from packlight.models.fused.load import load_fused_model

    fused = load_fused_model(folder, spec, device=device, weights=weights, on_progress=on_progress)
    if fused is not None:
        return fused
    # Importing transformers takes seconds.
    from packlight.models.adapter import load_transformers_model

    return load_transformers_model(folder, spec, device=device, on_progress=on_progress)
