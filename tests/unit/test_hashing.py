"""The page hash is a specification: these vectors must never change within version 1."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from packlight.core.hashing import HASH_BYTES, counter_uniform, page_hashes, root_hash


def test_vectors():
    hashes = page_hashes(list(range(8)), 4, fingerprint="model", salt="tenant")
    assert root_hash("model", 4, "tenant").hex() == "76023104172dd141bb48e78d392d9417"
    assert [page_hash.hex() for page_hash in hashes] == [
        "dba32ccda5a2f774221e5da8546e796f",
        "944d002121f37dd4a9f08069b366948e",
    ]


def test_is_the_written_specification():
    root = hashlib.blake2b(b"packlight/1\0model\0" + struct.pack("<I", 2) + b"s", digest_size=HASH_BYTES).digest()
    first = hashlib.blake2b(root + struct.pack("<II", 7, 49151), digest_size=HASH_BYTES).digest()
    assert page_hashes([7, 49151, 3], 2, fingerprint="model", salt="s") == [first]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 8), st.integers(0, 39))
def test_a_hash_names_the_whole_prefix(tokens, page_size, changed):
    hashes = page_hashes(tokens, page_size, fingerprint="m")
    assert len(hashes) == len(tokens) // page_size
    assert (
        page_hashes(tokens[: len(tokens) // 2], page_size, fingerprint="m") == hashes[: len(tokens) // 2 // page_size]
    )
    if changed < len(tokens):
        other = list(tokens)
        other[changed] ^= 1
        same = page_hashes(other, page_size, fingerprint="m")
        border = changed // page_size
        assert same[:border] == hashes[:border]
        assert not set(same[border:]) & set(hashes)


def test_model_salt_and_page_size_separate():
    tokens = list(range(16))
    variants = [
        page_hashes(tokens, 4, fingerprint="a"),
        page_hashes(tokens, 4, fingerprint="b"),
        page_hashes(tokens, 4, fingerprint="a", salt="t"),
        page_hashes(tokens, 8, fingerprint="a"),
    ]
    assert len({hashes[0] for hashes in variants}) == len(variants)


def test_counter_uniform_is_pure_and_uniform():
    draws = [counter_uniform(seed, position) for seed in range(40) for position in range(100)]
    assert draws == [counter_uniform(seed, position) for seed in range(40) for position in range(100)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert counter_uniform(-1, 3) == counter_uniform(2**64 - 1, 3)
