"""The numbers of a dummy model: drawn by name and place, so that every process that draws a number draws the same."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

_SPREAD = 0.02
"""As models are initialised: activations stay finite through any number of layers."""
_BLOCK_NUMBERS = 1 << 20
"""Drawn at a time, about: what a part of a parameter costs beyond itself."""


def dummy_tensor(name: str, shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Ones for the weight of a norm, zeros for a bias, else normal numbers that depend on `name`, their place and the
    kind of device only."""
    return DummyParameter(name, shape, dtype, device)[...]


class DummyParameter:
    """A parameter that is drawn where it is asked for, as a tensor in a safetensors file is read: of what is not asked
    for no more is drawn than what lies in the same block of rows."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> None:
        self._name, self._shape, self._dtype, self._device = name, list(shape), dtype, device

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, index: EllipsisType | tuple[slice, ...]) -> Tensor:
        """All of it, or a slice of every dim, without steps."""
        rows, *others = (slice(None),) * len(self._shape) if isinstance(index, EllipsisType) else index
        first, last, _ = rows.indices(self._shape[0])
        sizes = [len(range(*other.indices(size))) for other, size in zip(others, self._shape[1:], strict=True)]
        out = torch.empty((last - first, *sizes), dtype=self._dtype, device=self._device)
        for start, end in self._blocks(first, last):
            within = slice(max(first, start) - start, min(last, end) - start)
            out[max(first, start) - first : min(last, end) - first] = self._draw(start, end)[(within, *others)]
        return out

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The rows of each block that holds some of rows `first : last`."""
        step = max(1, _BLOCK_NUMBERS // math.prod(self._shape[1:]))
        for start in range(first - first % step, last, step):
            yield start, min(start + step, self._shape[0])

    def _draw(self, start: int, end: int) -> Tensor:
        block = torch.empty((end - start, *self._shape[1:]), dtype=self._dtype, device=self._device)
        if self._name.endswith("norm.weight"):
            return block.fill_(1)
        if self._name.endswith(".bias"):
            return block.zero_()
        seed = zlib.crc32(f"{self._name}/{start}".encode())
        return block.normal_(0.0, _SPREAD, generator=torch.Generator(device=self._device).manual_seed(seed))
