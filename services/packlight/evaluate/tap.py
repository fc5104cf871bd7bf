"""An attention backend that lets outputs be looked at. Knows the seam, and no backend behind it.

Shapes: T tokens of the step, H query heads, K KV heads, D head dim, R rows, L layers, C = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import AttentionBackend, AttentionPlan, DecodeBatch, PrefillBatch


class OutputTap:
    """Passes every call on, and keeps what the layers of the newest decode step made of their tokens."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self._outputs: list[Tensor] = []

    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        plan = self._backend.plan(batch)
        if isinstance(batch, PrefillBatch):
            return plan
        self._outputs = []
        return _TappedPlan(plan, self._outputs)

    def outputs(self) -> Tensor:
        """[R, L, C] fp32 of the newest decode step."""
        return torch.stack(self._outputs, dim=1)


class _TappedPlan:
    def __init__(self, plan: AttentionPlan, outputs: list[Tensor]) -> None:
        self._plan, self._outputs = plan, outputs

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        out_THD = self._plan.attend(layer, q_THD, k_TKD, v_TKD, scale=scale, sliding_window=sliding_window)
        self._outputs.append(out_THD.flatten(1).float())
        return out_THD
