"""Head-page tables: ragged rows out of one book."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packlight.kv.pages import PageBook
from packlight.kv.table import HeadPageTable

LAYERS, HEADS, PAGE = 2, 2, 4
ragged = st.lists(st.lists(st.integers(0, 11), min_size=HEADS, max_size=HEADS), min_size=LAYERS, max_size=LAYERS)


def pages_for(length):
    return -(-length // PAGE)


@given(st.lists(ragged, min_size=1, max_size=3), st.integers(0, 10))
def test_ragged_rows_grow_and_close(rows_lengths, num_steps):
    book = PageBook(200)
    table = HeadPageTable(book, num_rows=3, num_layers=LAYERS, num_kv_heads=HEADS, page_size=PAGE)
    rows = []
    for lengths in rows_lengths:
        row = table.open()
        for layer in range(LAYERS):
            pages = table.fill_layer(row, layer, lengths[layer])
            assert len(pages) == sum(map(pages_for, lengths[layer]))
        rows.append(row)
    for _ in range(num_steps):
        table.grow(rows)
        table.advance(rows)
    for row, lengths in zip(rows, rows_lengths, strict=True):
        expected = np.array(lengths) + num_steps
        assert (table.lengths[row] == expected).all()
        assert table.num_pages(row) == sum(pages_for(length) for length in expected.flatten().tolist())
    book.check([table.held(row) for row in rows])
    for row in rows:
        table.close(row)
    book.check([])
    assert book.num_free == book.num_pages
    assert table.num_free_rows == 3


def test_growing_takes_one_page_per_full_head_only():
    book = PageBook(20)
    table = HeadPageTable(book, num_rows=1, num_layers=1, num_kv_heads=2, page_size=PAGE)
    row = table.open()
    table.fill_layer(row, 0, [4, 5])
    before = book.num_free
    table.grow([row])
    assert before - book.num_free == 1
    table.grow([row])
    assert before - book.num_free == 1  # room for one token is room enough
