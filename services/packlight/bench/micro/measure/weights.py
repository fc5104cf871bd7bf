"""How many bytes of weights a step reads.

Knows that a model of ours holds tensors, somewhere below it. What a model holds it reads once per step; only an
embedding that is not also the head is read by the row, and counts as a whole all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from packlight.models.base import LanguageModel


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of all tensors that the model holds, each memory once: a tied head is the embedding."""
    memories = [tensor.untyped_storage() for tensor in _tensors(model, set())]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    else:
        for part in _parts(value):
            yield from _tensors(part, seen)


def _parts(value: object) -> Iterator[object]:
    """What a container holds, and the fields of objects of our own."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif type(value).__module__.startswith("packlight."):
        yield from getattr(value, "__dict__", {}).values()
        for cls in type(value).__mro__:
            slots = getattr(cls, "__slots__", ())
            yield from (getattr(value, name) for name in slots if hasattr(value, name))
