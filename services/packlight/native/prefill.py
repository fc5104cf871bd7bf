"""Prefill attention, natively: the argument structs of `src/prefill_attention.cpp` and its two functions.

Knows addresses, strides and counts; no tensors. Field for field the structs are those of `src/packlight.h`.
"""

from __future__ import annotations

import ctypes

from packlight.native.library import Library

_int64s = [
    *("q_token_stride", "q_head_stride", "k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"),
    *("num_chunks", "num_tokens", "sliding_window"),
    *("num_layers", "layer", "num_heads", "num_kv_heads", "head_dim", "page_size"),
]


class ChunkArgs(ctypes.Structure):
    """Rows `start : start + num_tokens` of the batch, behind `num_context` tokens. `blocks`: address of int64 ids."""

    _fields_ = (
        ("start", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_context", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
    )


class PrefillArgs(ctypes.Structure):
    """One layer of a batch. Addresses, then strides in elements, counts (`sliding_window` 0: none), scalars."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "k_pool", "v_pool", "scratch")),
        ("chunks", ctypes.POINTER(ChunkArgs)),
        *((name, ctypes.c_int64) for name in _int64s),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def scratch_bytes(library: Library, num_heads: int, num_kv_heads: int, head_dim: int, num_threads: int) -> int:
    """What `PrefillArgs.scratch` must have room for, for any batch of this shape."""
    function = library.functions.packlight_prefill_scratch_bytes
    function.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    function.restype = ctypes.c_size_t
    return int(function(num_heads, num_kv_heads, head_dim, num_threads))


def prefill_attention(library: Library, args: PrefillArgs) -> None:
    """Store the batch's k and v in the pool's blocks, then write the attention of its q to `args.out`, and each row's
    log-sum-exp to `args.lse`.

    A token's output is the same to the last bit however its prompt was cut into chunks, batched or spread over
    threads: a prompt that starts from cached pages computes exactly what it would have computed without them."""
    function = library.functions.packlight_prefill_attention
    function.argtypes = (ctypes.POINTER(PrefillArgs),)
    function.restype = None
    function(ctypes.byref(args))
