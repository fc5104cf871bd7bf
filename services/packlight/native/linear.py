"""x W^T for weights packed in panels, and rows of such weights: the C structs and calls of `src/linear.cpp`.

Knows addresses. How weights are packed and quantised is `models/fused/packing.py`.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

from packlight.native.library import Library

# Columns of a panel (rows of W), columns unpacked at once, and what the depth must be a multiple of.
PANEL, BLOCK, TILE_DEPTH = 16, 32, 32


class Format(IntEnum):
    BF16 = 0
    INT8 = 1
    INT4 = 2


class Linear(ctypes.Structure):
    """`PacklightLinear` of `src/packlight.h`. Whoever fills it in keeps the memory it points to."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


def room_elements(depth: int, num_threads: int) -> int:
    """How many bf16 elements of scratch a quantised product needs."""
    return num_threads * BLOCK * depth


class LinearFunctions:
    """The calls, declared once."""

    def __init__(self, library: Library) -> None:
        self._linear = library.functions.packlight_linear
        self._rows = library.functions.packlight_rows
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear.argtypes = (ctypes.POINTER(Linear), pointer, size, pointer, pointer, ctypes.c_int)
        self._rows.argtypes = (ctypes.POINTER(Linear), pointer, size, pointer, pointer, ctypes.c_int)
        self._linear.restype = self._rows.restype = None

    def multiply(self, linear: Linear, x: int, num_rows: int, out: int, room: int | None, num_threads: int) -> None:
        """`out` float32 `[num_rows, num_columns]` = `x` bf16 `[num_rows, depth]` times W^T, plus the bias."""
        self._linear(linear, x, num_rows, out, room, num_threads)

    def rows(self, linear: Linear, rows: int, num_rows: int, out: int, room: int | None, num_threads: int) -> None:
        """`out` bf16 `[num_rows, depth]`: the rows of W whose int64 numbers stand at `rows`."""
        self._rows(linear, rows, num_rows, out, room, num_threads)
