"""Reads the recorded kvpress comparison (tests/fixtures/kvpress). Needs neither kvpress nor its environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress"


@dataclass(frozen=True)
class Recording:
    """One forward pass of a small Llama, and what each kvpress method kept of it.

    facts: the description, with `cases` and `pyramid_schedules`. arrays: q_LHSD and k_LKSD (fp32, after RoPE),
    kept_<method>_<budget> (bool [L, K, S]) and scores_<method> (fp32 [L, K, S])."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def num_layers(self) -> int:
        return self.arrays["k_LKSD"].shape[0]

    @property
    def num_tokens(self) -> int:
        return self.arrays["k_LKSD"].shape[2]

    def queries(self, layer: int, window: int | None = None) -> Tensor:
        """[W, H, D]: the last `window` rows, or all."""
        q_SHD = torch.from_numpy(self.arrays["q_LHSD"][layer]).transpose(0, 1)
        return q_SHD if window is None else q_SHD[-window:]

    def keys(self, layer: int) -> Tensor:
        """[K, S, D]."""
        return torch.from_numpy(self.arrays["k_LKSD"][layer])

    @property
    def scale(self) -> float:
        return self.arrays["k_LKSD"].shape[-1] ** -0.5

    def kept(self, method: str, budget: int, layer: int) -> list[list[int]]:
        """The kept tokens of each KV head, ascending."""
        return [np.flatnonzero(kept_S).tolist() for kept_S in self.arrays[f"kept_{method}_{budget}"][layer]]


def load() -> Recording:
    with np.load(FIXTURE / "llama4.npz") as arrays:
        return Recording(json.loads((FIXTURE / "llama4.json").read_text()), dict(arrays))
