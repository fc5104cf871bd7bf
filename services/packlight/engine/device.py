"""Whether torch can compute on a device: asked before weights are read, which takes minutes, and after a failed step.

Knows torch's words for why not. Does not know what is computed.
"""

from __future__ import annotations

import torch

from packlight.core.errors import ConfigError, DeviceLost


def check_device(device: str) -> None:
    """Raises ConfigError with torch's reason for a device that there is not, or that is none."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"model.device {device!r}: {reason}. Give cpu, or a GPU such as cuda; `packlight doctor` says what is there"
        ) from None


def find_lost(device: torch.device) -> DeviceLost | None:
    """Why `device` computes no more, None if it does. Waits for what was asked of it before.

    Some errors of a GPU stay, an illegal address for one: whatever the process asks for then fails with them, and only
    a new process gets it back."""
    if device.type == "cpu":
        return None
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind has a class of its own
        reason = str(error).partition("\n")[0]
        return DeviceLost(f"{device} is lost to this process, which ends: {reason}")
    return None
