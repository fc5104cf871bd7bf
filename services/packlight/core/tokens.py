"""Token ids as the control plane handles them: thousands at a time, and mostly as one run of memory.

Knows the order of bytes that pages are hashed in (`hashing.py`) and prompts travel in. Does not know what a token means.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from sys import byteorder
from typing import Self


class TokenIds(tuple[int, ...]):
    """Token ids, and beside them the same as little-endian u32.

    Packing a long prompt walks over an object for every id. Whoever has just made them does it once, while they are in
    the processor's cache; everybody else finds it done."""

    packed: bytes

    def __new__(cls, token_ids: Iterable[int]) -> Self:
        """Raises OverflowError for an id that has no 32 bits."""
        made = super().__new__(cls, token_ids)
        made.packed = _pack(made)
        return made


def packed_ids(token_ids: Sequence[int]) -> bytes:
    """`token_ids` as little-endian u32, 4 bytes each."""
    return token_ids.packed if isinstance(token_ids, TokenIds) else _pack(token_ids)


def _pack(token_ids: Sequence[int]) -> bytes:
    ids = array("I", token_ids)
    if byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
