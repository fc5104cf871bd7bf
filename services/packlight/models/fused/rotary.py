"""Rotary position embedding (arXiv 2104.09864) as Hugging Face models apply it: element i turns with element i + D/2.

Legend: T tokens, H heads, D head dim, E = D / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """float32 `[E]`: how far each pair turns per position. `linear` divides all by a factor; `llama3` (Llama 3.1) only
    the slow ones, with a smooth passage between."""
    exponents_E = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies_E: Tensor = 1.0 / (float(rope["rope_theta"]) ** exponents_E)
    if rope["rope_type"] == "linear":
        return frequencies_E / float(rope["factor"])
    if rope["rope_type"] == "llama3":
        return _slowed(frequencies_E, rope)
    return frequencies_E


def turns(positions_T: Tensor, frequencies_E: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 `[T, E]`, of the angles at `positions_T`."""
    angles_TE = positions_T[:, None].float() * frequencies_E
    return angles_TE.cos(), angles_TE.sin()


def rotate(x_THD: Tensor, cosines_TE: Tensor, sines_TE: Tensor) -> Tensor:
    """`x_THD` turned, in float32 inside."""
    left_THE, right_THE = x_THD.float().chunk(2, dim=-1)
    cosines_T1E, sines_T1E = cosines_TE[:, None], sines_TE[:, None]
    turned = (left_THE * cosines_T1E - right_THE * sines_T1E, right_THE * cosines_T1E + left_THE * sines_T1E)
    return torch.cat(turned, dim=-1).to(x_THD.dtype)


def _slowed(frequencies_E: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """A pair that turns less than `low_freq_factor` times in the length it was first trained for is slowed by `factor`,
    one that turns more than `high_freq_factor` times is not."""
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    rounds_E = float(rope["original_max_position_embeddings"]) * frequencies_E / (2 * math.pi)
    kept_E = ((rounds_E - low) / (high - low)).clamp(0.0, 1.0)
    return kept_E * frequencies_E + (1.0 - kept_E) * frequencies_E / factor
