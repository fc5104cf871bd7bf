"""From numpy to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from packlight.kv.side_stream import moved


def upload(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on `device` in the array's dtype; on the CPU the array's own memory."""
    return moved(torch.from_numpy(array), device)
