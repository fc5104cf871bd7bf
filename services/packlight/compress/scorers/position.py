"""StreamingLLM (arXiv 2309.17453): keep the sinks and the most recent tokens, whatever they say.

Shapes: K KV heads, S keys, N prefix positions.

Keys keep the rotation of their original position here. The paper rotates by the place in the cache instead, which
matters beyond the trained length only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.compress.base import LayerView, Scored
from packlight.core.types import PackSpec


class PositionScorer:
    """The later a token, the higher its score. `select` forces the sinks."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Scored:
        num_prefix = view.num_tokens - view.q_WHD.shape[0]
        # fp32 counts exactly up to 2**24 positions.
        age_N = torch.arange(num_prefix, dtype=torch.float32, device=view.k_KSD.device)
        return Scored(age_N.expand(view.k_KSD.shape[0], num_prefix))
