"""Packing, natively: the argument struct of `src/pack.cpp` and its function.

Knows addresses and counts; no tensors and no dtypes, a token is a row of bytes. Field for field the struct is that of
`src/packlight.h`.
"""

from __future__ import annotations

import ctypes

from packlight.native.library import Library


class PackArgs(ctypes.Structure):
    """One prompt in one layer. `indices`: an address of int64 for each KV head, `num_tokens`: how many lie there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_pool", "v_pool", "blocks")),
        ("indices", ctypes.POINTER(ctypes.c_void_p)),
        ("num_tokens", ctypes.POINTER(ctypes.c_int64)),
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "layer", "num_kv_heads", "page_size", "row_bytes")),
        ("num_threads", ctypes.c_int32),
    )


def pack_pages(library: Library, args: PackArgs) -> None:
    """Write all bytes of `args.pages`. Token numbers must be ascending, and lie within the blocks."""
    function = library.functions.packlight_pack
    function.argtypes = (ctypes.POINTER(PackArgs),)
    function.restype = None
    function(ctypes.byref(args))
