"""How many kernels a step launches on a GPU, counted on a CPU: every operation of torch that computes or copies is one.

Operations that only look at memory in another way, or ask for some, launch nothing. A launch of one of our Triton
kernels counts as one, and computes nothing: what it would have computed comes from its twin in torch, which is not
counted. A matrix product counts as one, and so does FlashInfer's attention; they may be two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "new_empty")


class KernelCount(TorchDispatchMode):
    """While it is entered, `names` counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        is_new = any(x.untyped_storage().data_ptr() not in given for x in _tensors(out))
        if (is_new or func._schema.is_mutable) and not name.startswith(ALLOCATIONS):
            self.names[name] += 1
        return out


class Launches:
    """In place of a Triton kernel."""

    def __init__(self, count: KernelCount, name: str) -> None:
        self._count, self._name = count, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self._count.names[self._name] += 1


class CountedOps:
    """`ops` whose kernels are `Launches`; what they return is `twin`'s."""

    def __init__(self, ops: Any, twin: Any) -> None:
        self._ops, self._twin = ops, twin

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            getattr(self._ops, name)(*args, **kwargs)
            with _disable_current_modes():
                return getattr(self._twin, name)(*args, **kwargs)

        return run


class CountingEngine:
    """A `GraphEngine` that counts what it captures."""

    def __init__(self, count: KernelCount) -> None:
        self._count = count

    def capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self._count.names.clear()
        with self._count:
            out = step()
        return lambda: out

    def used_bytes(self) -> int:
        return 0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
