"""CUDA graphs on a CPU: torch's operations are recorded once, and run again on the same memory.

As with a real graph, a replay knows nothing of Python: what reaches it must be written into tensors that existed when
it was recorded. Between replays everything that the recording made is filled with garbage, so nothing survives by
accident. Fetching a number from a tensor while recording, or choosing a shape by one, is refused as CUDA refuses it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
}
PUTS = {torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


def puts_number(func, args):
    """`x[index] = 0`: torch makes a tensor of the number on the host and copies it, which the host waits for."""
    return func in PUTS and args[2].dim() == 0


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device, or needs to know what is in a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [x for x in _tensors(args) if x.dtype is torch.bool] if func is torch.ops.aten.index.Tensor else ()
        if func in WAITS or masks or puts_number(func, args):
            raise RuntimeError(f"operation that waits for the device: {func}")
        return func(*args, **(kwargs or {}))


class TapeEngine:
    """A `GraphEngine`."""

    def __init__(self):
        self.tapes = []

    def capture(self, step):
        tape = _Tape()
        with tape:
            out = step()
        self.tapes.append(tape)

        def replay():
            for other in self.tapes:  # graphs share their memory
                other.poison()
            tape.replay()
            return out

        return replay

    def used_bytes(self):
        return 0


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.fresh = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS or puts_number(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        fresh = [x.untyped_storage().data_ptr() not in given for x in _tensors(out)]
        self.calls.append((func, args, kwargs or {}, _tensors(out), fresh))
        self.fresh += [x for x, is_fresh in zip(_tensors(out), fresh, strict=True) if is_fresh]
        return out

    def poison(self):
        for x in self.fresh:
            x.fill_(torch.nan if x.is_floating_point() else (True if x.dtype is torch.bool else -(2**31)))

    def replay(self):
        for func, args, kwargs, outs, fresh in self.calls:
            again = _tensors(func(*args, **kwargs))
            for out, is_fresh, new in zip(outs, fresh, again, strict=True):
                if is_fresh:
                    out.copy_(new)


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
