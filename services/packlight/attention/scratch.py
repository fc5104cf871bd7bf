"""Memory that is used again and again. Knows sizes only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Grows to the largest use. Fresh memory from the system costs more than most copies into it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, *shape: int) -> Tensor:
        """A contiguous tensor with anything in it; it is valid until the next call."""
        numel = math.prod(shape)
        if numel > self._memory.numel():
            self._memory = torch.empty(numel, dtype=self._memory.dtype, device=self._memory.device)
        return self._memory[:numel].view(shape)
