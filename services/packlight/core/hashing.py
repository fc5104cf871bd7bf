"""Chained page hashes: the name of a prompt prefix, the same in every process and release.

Specification (version 1). All hashes are BLAKE2b with a 16-byte digest and no key.

    root      = BLAKE2b("packlight/1" 0x00 fingerprint 0x00 u32le(page_size) salt)
    hash[0]   = BLAKE2b(root      || u32le(token[0]) ... u32le(token[page_size-1]))
    hash[i]   = BLAKE2b(hash[i-1] || u32le(tokens of page i))

`fingerprint` is the model's (UTF-8), `salt` the tenant's cache salt (UTF-8, may be empty). Only full pages have a hash.
A hash names *exact* KV of the whole prefix up to its page; packed KV never gets one.
Test vectors: `tests/unit/test_hashing.py`.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from sys import byteorder

PageHash = bytes
HASH_BYTES = 16


def root_hash(fingerprint: str, page_size: int, salt: str = "") -> PageHash:
    head = b"packlight/1\0" + fingerprint.encode() + b"\0" + struct.pack("<I", page_size) + salt.encode()
    return hashlib.blake2b(head, digest_size=HASH_BYTES).digest()


def page_hashes(token_ids: Sequence[int], page_size: int, *, fingerprint: str, salt: str = "") -> list[PageHash]:
    """The chained hashes of every *full* page of `token_ids`: `len(token_ids) // page_size` of them."""
    tokens = array("I", token_ids)
    if byteorder == "big":
        tokens.byteswap()
    page_bytes = page_size * tokens.itemsize
    full = tokens.tobytes()[: len(tokens) // page_size * page_bytes]
    # Copying a fresh hasher takes three quarters of the time of setting one up, and every request waits for this.
    fresh, parent, hashes = hashlib.blake2b(digest_size=HASH_BYTES), root_hash(fingerprint, page_size, salt), []
    for (page,) in struct.iter_unpack(f"{page_bytes}s", full):
        hasher = fresh.copy()
        hasher.update(parent + page)
        parent = hasher.digest()
        hashes.append(parent)
    return hashes


def counter_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) only: the sampling noise of one token.

    53 bits of BLAKE2b(u64le(seed) || u64le(position)). Because it is a pure function, an answer is the same whatever
    the batch, the worker or the restart.
    """
    raw = struct.pack("<QQ", seed & 0xFFFFFFFFFFFFFFFF, position)
    word = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53
