"""The attention backends by name."""

from __future__ import annotations

from typing import Final

from packlight.core.registry import Registry

NATIVE: Final = "cpu"
TORCH: Final = "sdpa"
FLASHINFER: Final = "flashinfer"
AUTO: Final = "auto"  # not a backend: whoever builds one chooses

BACKENDS = Registry(
    "attention backend",
    {
        "reference": "packlight.attention.reference:ReferenceAttention",
        NATIVE: "packlight.attention.cpu:CpuAttention",
        TORCH: "packlight.attention.sdpa:SdpaAttention",
        FLASHINFER: "packlight.attention.flashinfer.backend:FlashInferAttention",
    },
)
