"""The randomised Hadamard rotation: a fixed pseudo-random rotation that every worker makes for itself.

H diag(s) / sqrt(d), H the Hadamard matrix (Sylvester's) and s random signs, turns any vector into one whose coordinates
look like those of a random direction, outliers spread out evenly (TurboQuant, arXiv 2504.19874, allows any random
rotation; this one needs no shipping and no QR). The signs are the first bits of SHAKE-128 over a text that names the
dimension: specified, hence the same in every version of every library.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from packlight.core.errors import InvalidRequest


def check_dim(dim: int) -> None:
    """Raise InvalidRequest unless there is a Hadamard matrix of this kind for `dim`."""
    if dim < 2 or dim & (dim - 1):
        raise InvalidRequest(
            f"kv.codec: the turboquant codecs rotate by a Hadamard matrix, whose size is a power of two; this model's "
            f"head_dim is {dim}. Choose int4 or int2 instead",
            param="kv.codec",
        )


def hadamard_rotation(dim: int) -> Tensor:
    """fp32 `[dim, dim]` with entries +-1: x @ R is sqrt(dim) times x rotated, and R @ R.T is dim times the identity.

    Raises InvalidRequest unless `dim` is a power of two."""
    check_dim(dim)
    hadamard = torch.ones(1, 1)
    for _ in range(dim.bit_length() - 1):
        hadamard = torch.cat([hadamard.repeat(1, 2), torch.cat([hadamard, -hadamard], dim=1)])
    return signs(dim)[:, None] * hadamard


def signs(dim: int) -> Tensor:
    """`dim` fixed random signs, fp32."""
    digest = hashlib.shake_128(f"packlight hadamard {dim}".encode()).digest(-(-dim // 8))
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:dim]
    return torch.from_numpy(1.0 - 2.0 * bits).float()
