"""The exact top-k of a vector under a stated tie rule: value descending, then index ascending.

Shapes: N values. Pooled scores have long runs of equal values, and `torch.topk` promises no order among them, so it
alone would make a selection depend on device and version. Only the *value* of the k-th best is taken from a library.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def top_indices(values_N: Tensor, k: int) -> Tensor:
    """Indices (int64, ascending) of the k <= N best of a float32 or float64 vector without NaN."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values_N.device)
    return indices_from(values_N, k, kth_best(values_N, k))


def kth_best(values_N: Tensor, k: int) -> Tensor:
    """The k-th largest value, 1 <= k <= N, as a 0-d tensor."""
    if values_N.device.type == "cpu":
        # Measured 3 to 7 times faster than torch.topk and torch.kthvalue on CPU.
        place = values_N.shape[0] - k
        return torch.from_numpy(np.partition(values_N.numpy(), place)[place : place + 1])[0]
    return values_N.topk(k, sorted=False).values.amin()


def indices_from(values_N: Tensor, k: int, threshold: Tensor | float) -> Tensor:
    """`top_indices` when the k-th largest value is known already."""
    index = (values_N >= threshold).nonzero().squeeze(1)
    num_extra = index.shape[0] - k
    if num_extra == 0:
        return index
    tied = (values_N[index] == threshold).nonzero().squeeze(1)
    keep = torch.ones_like(index, dtype=torch.bool)
    keep[tied[-num_extra:]] = False
    return index[keep]
