"""Books by shard: a head's pages are its own shard's, and nothing is taken unless every shard has enough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.errors import InternalError
from packlight.kv.pages import OutOfPages, PageBook
from packlight.kv.shards import ShardedPageBook, open_book

SHARDS, HEADS, SIZE = 2, 4, 10


def book_of():
    return ShardedPageBook(SHARDS * SIZE, num_shards=SHARDS, num_kv_heads=HEADS)


@given(st.lists(st.lists(st.integers(0, HEADS - 1), max_size=8), max_size=6), st.data())
def test_pages_are_dealt_by_head_and_the_books_balance(asked, data):
    book, held = book_of(), []
    for heads in asked:
        free = book.num_free
        counts = [sum(head // 2 == shard for head in heads) for shard in range(SHARDS)]
        rooms = [SIZE - sum((pages // SIZE == shard).sum() for pages in held) for shard in range(SHARDS)]
        if any(count > room for count, room in zip(counts, rooms, strict=True)):
            with pytest.raises(OutOfPages, match=r"of shard \d wanted"):
                book.allocate_for(np.array(heads, dtype=np.intp))
            assert book.num_free == free
            continue
        pages = book.allocate_for(np.array(heads, dtype=np.intp))
        assert [page // SIZE for page in pages.tolist()] == [head // 2 for head in heads]
        held.append(pages)
        if data.draw(st.booleans()):
            book.release(held.pop(0))
    book.check(held)
    assert book.num_held == sum(map(len, held)) == book.num_pages - book.num_free
    if held and len(held[0]):
        with pytest.raises(InternalError, match="reference counts"):
            book.check(held[1:])


def test_one_shard_is_a_plain_book():
    assert isinstance(open_book(8, num_shards=1, num_kv_heads=4), PageBook)
    assert isinstance(open_book(8, num_shards=2, num_kv_heads=4), ShardedPageBook)
