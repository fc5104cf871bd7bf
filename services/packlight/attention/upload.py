"""From numpy to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on `device` in the array's dtype; on the CPU the array's own memory.

    Goes through pinned memory, which torch does not use again before the copy is done."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
