"""Fewer cells of parametrised tests, so that every two values of different parameters still meet in one.

Knows what pytest calls its parameters, not what they mean. Where the whole product is too dear - under the sanitizers,
which slow the kernels down several times - a fault of one value, or of two together, is found all the same; one that
takes three at once is left to the whole product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest

Value = tuple[str, int]  # of which parameter, and which object: the cells of a grid share theirs
Pair = tuple[Value, Value]


def pairwise(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The cells to run, in their order. Tests with fewer than three parameters keep all of theirs."""
    ordered = list(items)
    grids: dict[str, dict[pytest.Item, frozenset[Pair]]] = defaultdict(dict)
    for item in ordered:
        grids[item.nodeid.partition("[")[0]][item] = _pairs(item)
    chosen = {cell for grid in grids.values() for cell in _cover(grid)}
    return [item for item in ordered if item in chosen]


def _cover(grid: dict[pytest.Item, frozenset[Pair]]) -> set[pytest.Item]:
    """Each time the cell that brings the most pairs; all cells that have none."""
    missing: set[Pair] = set().union(*grid.values())
    chosen = {cell for cell, pairs in grid.items() if not pairs}
    while missing:
        best = max(grid, key=lambda cell: len(grid[cell] & missing))
        chosen.add(best)
        missing -= grid[best]
    return chosen


def _pairs(cell: pytest.Item) -> frozenset[Pair]:
    callspec: Any = getattr(cell, "callspec", None)
    values = sorted((name, id(value)) for name, value in callspec.params.items()) if callspec is not None else ()
    return frozenset(combinations(values, 2))
