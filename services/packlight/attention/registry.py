"""The attention backends by name."""

from __future__ import annotations

from packlight.core.registry import Registry

BACKENDS = Registry(
    "attention backend",
    {
        "reference": "packlight.attention.reference:ReferenceAttention",
        "sdpa": "packlight.attention.sdpa:SdpaAttention",
    },
)
