"""The native CPU backend: compiled kernels that read pages where they lie.

Knows which kernel a batch goes to. What no kernel can do (a dtype other than fp32 and bf16, very wide heads) is left to
the torch backend. Legend as in `attention/base.py`.
"""

from __future__ import annotations

import logging

import torch

from packlight.attention.base import AttentionPlan, DecodeBatch, PrefillBatch
from packlight.attention.cpu_decode import CpuDecode
from packlight.attention.cpu_prefill import CpuPrefill
from packlight.attention.sdpa import SdpaAttention
from packlight.native.decode import MAX_HEAD_DIM, decode_attention
from packlight.native.library import Library, open_library

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16)


class CpuAttention:
    def __init__(self, library: Library | None = None) -> None:
        """Without a library: the best that can be had. Raises NativeUnavailable."""
        self._library = library or open_library(on_progress=log.info)
        self._decode = decode_attention(self._library)

    @property
    def library(self) -> Library:
        """The compiled code that it runs."""
        return self._library

    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        if batch.pool.dtype not in DTYPES or batch.pool.head_dim > MAX_HEAD_DIM:
            return SdpaAttention().plan(batch)
        if isinstance(batch, PrefillBatch):
            return CpuPrefill(batch, self._library)
        return CpuDecode(batch, self._decode)
