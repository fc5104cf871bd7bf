"""Decode attention over head pages: one native call per layer of a step.

Knows the layout of the arguments, no tensors. Legend: B rows, L layers, K KV heads, G query heads per KV head,
M pages per head, P page size, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import ClassVar

from packlight.native.library import Library

# What the kernel keeps on its stack.
MAX_HEAD_DIM = 256

# Ways to rate pages, as `PageRating` in `kv/reading.py`.
SUM_OF_BOUNDS, MASS_OF_REPRESENTATIVES = 1, 2


class DecodeArguments(ctypes.Structure):
    """What one call reads. Filled in once per step; only the fields of the layer change between its calls.

    Addresses are borrowed: what they point to must live until the step is over. Strides are in elements; a head's
    numbers lie one after another. q `[*, K * G, D]`, k and v `[*, K, D]`, out the same shape as q and contiguous; all
    of the pool's type. k is null where the new token has been stored already.

    records: uint8 `[N, record_bytes]`, null unless the pool is coded. states: int32 `[N]`, negative for a coded page,
    else its place in the open store, which k_pages and v_pages are then. bits, value_group: as in `kv/coded.py`. New
    tokens of a coded pool must have been stored already.

    pages: int32 `[rows of the table, L, K, pages_per_head]`. table_rows: int32 `[B]`, its rows that are attended.
    places: int32 `[B]`, where these rows stand in q, k, v and out.
    lengths, new_index: int32 `[B, L, K]`, tokens stored once the new one is, at least 1, and which of them that is.
    window: how many of the last tokens are seen; 0 for all.

    ratings: int32 `[B]`, how each row's pages are rated: 0 for rows that read all of theirs, else one of SUM_OF_BOUNDS
    and MASS_OF_REPRESENTATIVES; null where there are only the former. num_dims, max_pages, num_dense_layers: int32
    `[B]`, as in `kv/reading.py`. bounds: `[N, 2 * D]` of the pool's type, the summaries of its pages, kept up to date
    in the rows and layers that are rated."""

    _fields_: ClassVar = [
        ("k_pages", ctypes.c_void_p),
        ("v_pages", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("is_bf16", "num_layers", "num_kv_heads", "page_size", "head_dim")),
        ("records", ctypes.c_void_p),
        ("record_bytes", ctypes.c_int64),
        ("states", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("value_group", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("pages", ctypes.c_void_p),
        ("pages_per_head", ctypes.c_int64),
        ("table_rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("new_index", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("bounds", "ratings", "num_dims", "max_pages", "num_dense_layers")),
        ("layer", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((f"{name}_{of}_stride", ctypes.c_int64) for name in ("q", "k", "v") for of in ("row", "head")),
    ]


def reads_records(*, bits: int, value_group: int, page_size: int, head_dim: int) -> bool:
    """Whether the kernel can read such records in place: whole vectors of codes, of whole bytes or halves of them."""
    return bits in (4, 8) and page_size % 16 == 0 and head_dim % 32 == 0 and value_group % 16 == 0


DecodeKernel = Callable[[DecodeArguments], None]


def decode_attention(library: Library) -> DecodeKernel:
    """The kernel: stores each row's new token and writes what it attends to. Keeps no state and raises nothing."""
    function = library.functions.packlight_decode_attention
    function.argtypes, function.restype = (ctypes.POINTER(DecodeArguments),), None
    kernel: DecodeKernel = function
    return kernel
