"""H2O (arXiv 2306.14048) at the end of the prompt: heavy hitters and recent tokens.

Shapes: K KV heads, S keys, N prefix positions.

A heavy hitter is a token that all queries of the prompt, not only the last ones, attended to most in sum. The paper
gives half of the layer's budget to the most recent tokens, which few queries have seen yet; the window is among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.compress.base import LayerView, Scored
from packlight.compress.budget import max_kept
from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec


class AccumulatedScorer:
    """The attention mass of all queries. Needs `view.accumulated_KS`."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Scored:
        assert view.accumulated_KS is not None, "this scorer's recipes are marked as needing all queries"
        num_prefix = view.num_tokens - view.q_WHD.shape[0]
        scores_KN = view.accumulated_KS[:, :num_prefix].clone()
        kept = max_kept(spec, view.num_tokens, view.site)
        num_recent = min(int(param_of(spec, "recent") * kept), kept - spec.sinks)
        scores_KN[:, max(0, view.num_tokens - num_recent) :] = torch.inf
        return Scored(scores_KN)
