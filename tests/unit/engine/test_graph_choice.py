"""Which captured step a decode step is replayed with: by hand."""

from typing import ClassVar

import numpy as np
import pytest

from packlight.attention.base import FixedShape
from packlight.engine.graph_choice import Mode, choose_shape, is_even, pad_rows
from packlight.kv.reading import PageRating, PageRule, Reading

PAGE = 4


class Ruled:
    rule: ClassVar = PageRule(PageRating.SUM_OF_BOUNDS)

    def score(self, query):
        raise NotImplementedError

    def forget(self, row):
        pass


class OtherRule(Ruled):
    rule: ClassVar = PageRule(PageRating.MASS_OF_REPRESENTATIVES, 8)


class Remembers:
    def score(self, query):
        raise NotImplementedError

    def forget(self, row):
        pass


SPARSE = Reading(Ruled(), 5, num_dense_layers=1)
SHAPES = [FixedShape(rows, pages, reading) for rows in (8, 2) for pages in (100, 10) for reading in (None, SPARSE)]


def lengths(*rows, layers=3):
    return np.array([[[row, row]] * layers for row in rows], dtype=np.int32)


def choose(lengths_BLK, reads=()):
    return choose_shape(SHAPES, lengths_BLK, PAGE, reads, [None] * lengths_BLK.shape[1])


def test_the_smallest_that_fits():
    assert choose(lengths(40)) == FixedShape(2, 10)
    assert choose(lengths(40, 41)) == FixedShape(2, 100)
    assert choose(lengths(40, 7, 7)) == FixedShape(8, 10)
    assert choose(lengths(*[400] * 8)) == FixedShape(8, 100)


def test_uneven_layers_need_a_shape_for_them_and_even_ones_do_not_take_it():
    uneven, both = lengths(40), [*SHAPES, FixedShape(8, 100, None, is_even=False)]
    uneven[0, 1, 1] += 1
    assert choose_shape(both, uneven, PAGE, (), [None] * 3) == both[-1]
    assert choose_shape(both, lengths(*[400] * 8), PAGE, (), [None] * 3) == FixedShape(8, 100)
    assert choose_shape(both, uneven, PAGE, [SPARSE], [None] * 3) is Mode.UNEVEN


def test_what_fits_nowhere_says_why():
    assert choose(lengths(*[7] * 9)) is Mode.BATCH
    assert choose(lengths(401)) is Mode.PAGES
    uneven = lengths(40)
    uneven[0, 1, 1] += 1
    assert choose(uneven) is Mode.UNEVEN
    assert choose(lengths(40), [Reading(Remembers(), 3, 1)]) is Mode.READERS


@pytest.mark.parametrize(
    ("reading", "fits"),
    [
        (Reading(Ruled(), 5, 1), True),
        (Reading(Ruled(), 2, 1), True),
        (Reading(Ruled(), 6, 1), False),
        (Reading(Ruled(), 5, 0), False),
        (Reading(OtherRule(), 5, 1), False),
    ],
)
def test_a_reading_fits_one_of_the_same_rule_that_reads_as_much(reading, fits):
    assert choose(lengths(40, 8), [reading, SPARSE]) == (FixedShape(2, 10, SPARSE) if fits else Mode.READERS)


def test_a_dense_row_in_a_sparse_step_reads_no_more_than_the_others_may():
    assert choose(lengths(40, 20), [SPARSE, None]) == FixedShape(2, 10, SPARSE)
    assert choose(lengths(40, 21), [SPARSE, None]) is Mode.READERS
    assert choose(lengths(40, 400), [None, None]) == FixedShape(2, 100)


def test_layers_with_other_windows_may_hold_other_lengths():
    uneven = lengths(40, layers=4)
    uneven[:, [0, 2]] = 9
    assert is_even(uneven, [8, None, 8, None], None)
    assert not is_even(uneven, [8, 8, None, None], None)
    dense_first = lengths(40, layers=4)
    dense_first[:, 0] = 90
    assert not is_even(dense_first, [None] * 4, None)
    assert is_even(dense_first, [None] * 4, SPARSE)


def test_padding_repeats_the_cheapest_row():
    assert pad_rows([7, 5, 9], [30, 10, 20], 5) == [0, 1, 2, 1, 1]
    assert pad_rows([7], [30], 1) == [0]
