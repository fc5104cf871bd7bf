"""Drawing the tokens of many rows at once, on the logits' device, without waiting for it.

The same draw as `sampler.py` makes row by row on the CPU: the same filters in the same order, the same ties, fp64, and
inverse CDF over ascending token ids with the same noise, which is worked out on the host beforehand. Sums are added up
in another order, so the two may differ where the noise falls within rounding of the border between two tokens.

Shapes: R rows, V vocabulary; 1 stands for one number per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packlight.attention.upload import upload
from packlight.core.types import SamplingParams


def draw_rows(logits_RV: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]) -> Tensor:
    """Token ids int64 `[R]`; of rows with temperature 0, or of logits that are not finite at their best, any id.

    Uses temperature, top-k, min-p and top-p; `noise` is in [0, 1)."""
    settings = np.array(
        [[p.temperature or 1.0, p.top_k or logits_RV.shape[1], p.min_p, p.top_p] for p in params], dtype=np.float64
    )
    columns = upload(np.column_stack([settings, noise]), logits_RV.device)
    temperature_R1, top_k_R1, min_p_R1, top_p_R1, noise_R1 = torch.split(columns, 1, dim=1)
    logits_RV = logits_RV.float()
    weights_RV = logits_RV.double().sub_(logits_RV.amax(dim=1, keepdim=True)).div_(temperature_R1).exp_()
    if any(p.top_k or p.min_p or p.top_p < 1.0 for p in params):
        weights_RV = _filtered(logits_RV, weights_RV, top_k_R1, min_p_R1, top_p_R1)
    return _inverse_cdf(weights_RV, noise_R1)


def _filtered(logits_RV: Tensor, weights_RV: Tensor, top_k_R1: Tensor, min_p_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """The weights of tokens that survive; 0 elsewhere. Equal logits rank by ascending id."""
    order_RV = logits_RV.sort(dim=1, descending=True, stable=True).indices
    ranked_RV = weights_RV.gather(1, order_RV)
    rank_V = torch.arange(ranked_RV.shape[1], device=ranked_RV.device)
    ranked_RV = ranked_RV.masked_fill((rank_V >= top_k_R1) | (ranked_RV < min_p_R1), 0.0)
    cdf_RV = ranked_RV.cumsum(dim=1)
    # A token stays as long as those before it do not reach the goal.
    is_beyond_RV = torch.zeros_like(cdf_RV, dtype=torch.bool)
    is_beyond_RV[:, 1:] = (cdf_RV[:, :-1] >= top_p_R1 * cdf_RV[:, -1:]) & (top_p_R1 < 1.0)
    return torch.zeros_like(weights_RV).scatter_(1, order_RV, ranked_RV.masked_fill(is_beyond_RV, 0.0))


def _inverse_cdf(weights_RV: Tensor, noise_R1: Tensor) -> Tensor:
    """The first token of positive weight at which the CDF passes the noise. Sums that are made in parallel may go down
    by a rounding, so the CDF is not searched as if it were sorted."""
    is_possible_RV = weights_RV > 0
    cdf_RV = weights_RV.cumsum(dim=1).masked_fill_(~is_possible_RV, -1.0)
    is_past_RV = cdf_RV > noise_R1 * cdf_RV.amax(dim=1, keepdim=True)
    return is_past_RV.byte().argmax(dim=1)  # the first of equals
