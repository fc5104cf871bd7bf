"""A CPU on which some tensors count as a device's: whoever asks what is in one of them, or for a shape that depends on
it, is refused. Tensors of the host may be asked, as they may beside a real device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.tape import WAITS, puts_number


class DeviceTensors(TorchDispatchMode):
    """Refuses what would have the host wait for `tensors`, or for what is made of them. They count by storage."""

    def __init__(self, *tensors):
        super().__init__()
        self._storages = {}
        self._add(tensors)

    def _add(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._storages[tensor.untyped_storage().data_ptr()] = tensor

    def _is_there(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self._storages

    def move(self, host, device):
        """Stands for `moved` of `kv/side_stream.py`."""
        moved = host.clone()
        self._add([moved])
        return moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        is_there = any(self._is_there(x) for x in given)
        masks = [x for x in given if isinstance(x, torch.Tensor) and x.dtype is torch.bool]
        waits = func in WAITS or (masks and func is torch.ops.aten.index.Tensor)
        waits = waits or (puts_number(func, args) and not self._is_there(args[2]))
        if is_there and waits:
            raise RuntimeError(f"operation that waits for the device: {func}")
        out = func(*args, **(kwargs or {}))
        if is_there:
            self._add(out)
        return out
