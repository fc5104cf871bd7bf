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


@given(
    st.lists(ragged, min_size=1, max_size=3),
    st.lists(st.lists(st.integers(-1, 9), min_size=LAYERS * HEADS, max_size=LAYERS * HEADS), max_size=12),
)
def test_heads_that_overwrite_keep_their_length_and_take_no_page(rows_lengths, steps):
    """-1 appends; anything else, within what is stored, overwrites. The next step appends unless told again."""
    book = PageBook(200)
    table = HeadPageTable(book, num_rows=3, num_layers=LAYERS, num_kv_heads=HEADS, page_size=PAGE)
    expected, rows = {}, []
    for lengths in rows_lengths:
        row = table.open()
        for layer in range(LAYERS):
            table.fill_layer(row, layer, lengths[layer])
            for head in range(HEADS):
                expected[row, layer, head] = lengths[layer][head]
        rows.append(row)
    for places in steps:
        for row in rows:
            for (layer, head), place in zip(np.ndindex(LAYERS, HEADS), places, strict=True):
                table.overwrite[row, layer, head] = place if place < expected[row, layer, head] else -1
        indices = table.new_index(rows)
        appended = table.overwrite[rows] < 0
        for index, (row, layer, head) in enumerate(expected):
            if appended.flatten()[index]:
                assert indices.flatten()[index] == expected[row, layer, head]
                expected[row, layer, head] += 1
            else:
                assert indices.flatten()[index] == table.overwrite[row, layer, head]
        table.grow(rows)
        assert table.new_lengths(rows).flatten().tolist() == list(expected.values())
        table.advance(rows)
        assert (table.overwrite == -1).all()
    assert table.lengths[rows].flatten().tolist() == list(expected.values())
    assert book.num_held == sum(map(pages_for, expected.values()))
    book.check([table.held(row) for row in rows])


def test_a_closed_row_overwrites_nothing_when_it_is_opened_again():
    table = HeadPageTable(PageBook(20), num_rows=1, num_layers=1, num_kv_heads=1, page_size=PAGE)
    row = table.open()
    table.fill_layer(row, 0, [5])
    table.overwrite[row] = 3
    table.close(row)
    row = table.open()
    table.fill_layer(row, 0, [2])
    assert table.new_index([row]).tolist() == [[[2]]]
