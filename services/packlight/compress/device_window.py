"""The window's attention on a GPU: keys are read where they lie in the pool, and never gathered.

Knows where there is a kernel for it (`window_kernel.py`, by Triton) and what stands in: torch, over copied keys. The
kernel adds up weights that are final as they are made, so it needs the rows' log-sum-exp, which attention knows anyway.
Legend as in `window.py`.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from packlight.compress.window import WindowAttention, attention_given
from packlight.kv.pool import KVPool


def has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class DeviceWindow:
    """A `StoredWindow` over one pool, on a device that `has_kernel`. Waits for nothing where `lse_WH` is given."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def attend(
        self, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor | None = None
    ) -> WindowAttention:
        """See `StoredWindow`."""
        if lse_WH is None:
            return attention_given(q_WHD, self._pool.read_keys(layer, blocks, num_tokens), scale, None)
        mass_KS = compiled_mass(self._pool, layer, q_WHD, blocks, num_tokens, scale, lse_WH)
        return WindowAttention(mass_KS, lse_WH)


def compiled_mass(
    pool: KVPool, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor
) -> Tensor:
    """fp32 `[K, S]`: see `WindowAttention`."""
    kernel = importlib.import_module("packlight.compress.window_kernel")
    q_WHD = q_WHD.to(pool.dtype)
    q_WHD = q_WHD if q_WHD.stride(2) == 1 else q_WHD.contiguous()
    mass_KS: Tensor = kernel.stored_mass(q_WHD, pool.k, layer, blocks, num_tokens, scale, lse_WH)
    return mass_KS
