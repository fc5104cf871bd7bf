"""The numbers of a dummy model: drawn, by name, so that every process that draws them has the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_SPREAD = 0.02
"""As models are initialised: activations stay finite through any number of layers."""


def dummy_tensor(name: str, shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Ones for the weight of a norm, zeros for a bias, else normal numbers that depend on `name` and the kind of
    device only."""
    if name.endswith("norm.weight"):
        return torch.ones(*shape, dtype=dtype, device=device)
    if name.endswith(".bias"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    drawn = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(*shape, dtype=dtype, device=device).normal_(0.0, _SPREAD, generator=drawn)
