"""CAKE (ICLR 2025): tokens by the mean and the variance of their attention, layers by how they spread and move theirs.

Shapes: W window rows, S keys, N prefix positions, K KV heads, G query heads per KV head.

A layer that attends to many tokens (dispersion: the entropy of its attention) or to other tokens from row to row
(shift: the variance of its attention) loses more by keeping few. `budgets/cake.py` divides the prompt's tokens so.
"""

from __future__ import annotations

from torch import Tensor

from packlight.compress.base import LayerView, Scored
from packlight.compress.recipes import param_of
from packlight.compress.scorers.window import pooled
from packlight.compress.window import window_spread
from packlight.core.types import PackSpec, Pooling

KERNEL = 5


class CakeScorer:
    """Mean over the group of mean + gamma * variance over the window's rows, averaged over neighbouring tokens.

    The layer's weight is dispersion ** (1 / tau1) * shift ** (1 / tau2)."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Scored:
        spread = window_spread(view.q_WHD, view.k_KSD, view.scale, view.lse_WH)
        window, group = view.q_WHD.shape[0], view.q_WHD.shape[1] // view.k_KSD.shape[0]
        mean_KN = mass_KS[:, : spread.variance_KN.shape[1]] / (window * group)
        wanted_KN = mean_KN + param_of(spec, "gamma") / group * spread.variance_KN
        scores_KN = pooled(wanted_KN, KERNEL if spec.kernel is None else spec.kernel, Pooling.AVG)
        shift = spread.variance_KN.sum().item()
        weight = spread.entropy ** (1 / param_of(spec, "tau1")) * shift ** (1 / param_of(spec, "tau2"))
        return Scored(scores_KN, weight)
