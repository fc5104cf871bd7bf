"""Reading memory as fast as it goes: what every kernel's speed is compared with."""

from __future__ import annotations

import ctypes

from packlight.native.library import Library


def stream_read(library: Library, address: int, num_bytes: int, num_threads: int) -> int:
    """Read `num_bytes` at `address` (64-byte aligned, a multiple of 64) once, split evenly over the threads.

    Returns the sum of its 64-bit words, modulo 2**64: proof that it was read."""
    function = library.functions.packlight_stream_read
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_uint64
    return int(function(address, num_bytes, num_threads))
