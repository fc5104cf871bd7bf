"""Which cells of a grid are run where not all are."""

from itertools import combinations, product
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairwise import pairwise


class Cell:
    """What `pairwise` looks at of a pytest item."""

    def __init__(self, name, **params):
        self.nodeid = f"{name}[{'-'.join(map(str, params.values()))}]" if params else name
        if params:
            self.callspec = SimpleNamespace(params=params)


def grid_of(name, values):
    return [Cell(name, **dict(zip(values, cell, strict=True))) for cell in product(*values.values())]


def pairs_in(cells):
    return {pair for cell in cells for pair in combinations(sorted(cell.callspec.params.items()), 2)}


grids = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 5), min_size=1).map(
    lambda sizes: {name: [f"{name}{i}" for i in range(size)] for name, size in sizes.items()}
)


@given(grids)
def test_every_two_values_meet_in_a_cell(values):
    cells = grid_of("test", values)
    kept = pairwise(cells)
    assert pairs_in(kept) == pairs_in(cells)
    assert kept == [cell for cell in cells if cell in kept], "in their order"


def test_fewer_cells_do_for_three_parameters_and_all_are_needed_for_two():
    three = grid_of("three", {"a": ["x", "y", "z"], "b": [1, 2, 3, 4], "c": [None, True]})
    assert 12 <= len(pairwise(three)) < len(three) / 1.5
    two = grid_of("two", {"a": ["x", "y", "z"], "b": [1, 2, 3, 4]})
    assert pairwise(two) == two


def test_each_test_has_a_grid_of_its_own_though_they_come_mixed():
    one, other = (grid_of(name, {"a": [1, 2], "b": [3, 4]}) for name in ("one", "other"))
    mixed = [cell for pair in zip(one, other, strict=True) for cell in pair]
    assert pairwise([*mixed, Cell("plain")])[:-1] == mixed
    assert pairwise([Cell("plain")])[0].nodeid == "plain"
