"""Token ids and their bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.hashing import page_hashes
from packlight.core.tokens import TokenIds, packed_ids

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=100)


@given(IDS)
def test_they_are_a_tuple_with_its_bytes_beside_it(ids: list[int]) -> None:
    made = TokenIds(ids)
    assert made == tuple(ids)
    assert hash(made) == hash(tuple(ids))
    assert made.packed == struct.pack(f"<{len(ids)}I", *ids)
    assert packed_ids(made) is made.packed
    assert packed_ids(ids) == packed_ids(tuple(ids)) == made.packed


@given(IDS, st.integers(1, 20))
def test_they_are_hashed_as_any_other_sequence(ids: list[int], page_size: int) -> None:
    hashes = page_hashes(TokenIds(ids), page_size, fingerprint="f")
    assert hashes == page_hashes(ids, page_size, fingerprint="f")
    assert len(hashes) == len(ids) // page_size


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_what_has_no_32_bits_is_refused(wrong: int) -> None:
    with pytest.raises(OverflowError):
        TokenIds([1, wrong])
