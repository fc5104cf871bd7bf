"""The window's attention, natively: the argument struct of `src/window_attention.cpp` and its function.

Knows addresses, strides and counts; no tensors. Field for field the struct is that of `src/packlight.h`.
"""

from __future__ import annotations

import ctypes

from packlight.native.library import Library

_int64s = [
    *("q_token_stride", "q_head_stride"),
    *("num_rows", "num_keys", "num_layers", "layer", "num_heads", "num_kv_heads", "head_dim", "page_size"),
]


class WindowArgs(ctypes.Structure):
    """One prompt in one layer. Addresses, then strides in elements, counts, scalars."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_pool", "blocks", "mass", "lse", "scratch")),
        *((name, ctypes.c_int64) for name in _int64s),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
        ("lse_is_known", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def scratch_bytes(
    library: Library, num_rows: int, num_keys: int, head_dim: int, lse_is_known: bool, num_threads: int
) -> int:
    """What `WindowArgs.scratch` must have room for. `num_rows`: of all query heads that share a KV head."""
    function = library.functions.packlight_window_scratch_bytes
    function.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
    function.restype = ctypes.c_size_t
    return int(function(num_rows, num_keys, head_dim, lse_is_known, num_threads))


def window_attention(library: Library, args: WindowArgs) -> None:
    """Write `args.mass` and, unless it is known, `args.lse`, accumulated in fp32. The same to the last bit on any
    number of threads."""
    function = library.functions.packlight_window_attention
    function.argtypes = (ctypes.POINTER(WindowArgs),)
    function.restype = None
    function(ctypes.byref(args))
