"""A transformer layer but for its attention: the C structs and the call of `src/linear_layer.cpp`.

Knows addresses. One call does everything between the attention of one layer and that of the next, in one parallel
region: starting one costs as much as a small product.
"""

from __future__ import annotations

import ctypes

from packlight.native.library import Library
from packlight.native.linear import Linear


class Layer(ctypes.Structure):
    """`PacklightLayer` of `src/packlight.h`."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", Linear),
        ("out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
    )


class Step(ctypes.Structure):
    """`PacklightStep` of `src/packlight.h`."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("hidden", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("gated", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    )


class LayerFunctions:
    """The call, declared once."""

    def __init__(self, library: Library) -> None:
        self._layers = library.functions.packlight_layers
        optional_layer = ctypes.POINTER(Layer)
        self._layers.argtypes = (optional_layer, optional_layer, ctypes.POINTER(Step), ctypes.c_int)
        self._layers.restype = None

    def between(self, ended: Layer | None, begun: Layer | None, step: Step, num_threads: int) -> None:
        """The rest of `ended` after its attention, then q, k and v of `begun`; either may be missing."""
        self._layers(ended, begun, step, num_threads)
