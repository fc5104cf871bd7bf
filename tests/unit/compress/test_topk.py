import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.topk import kth_best, top_indices, top_of_rows
from tests.support.tape import NoWaiting


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")]), min_size=1, max_size=60), st.data())
def test_score_descending_then_index_ascending(values, data):
    k = data.draw(st.integers(0, len(values)))
    by_hand = sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:k])
    index = top_indices(torch.tensor(values), k)
    assert index.tolist() == by_hand
    assert index.dtype == torch.int64


def test_long_plateaus():
    values = torch.zeros(100_000)
    values[70_000:70_063] = 1.0
    assert top_indices(values, 100).tolist() == [*range(37), *range(70_000, 70_063)]
    assert top_indices(values, 10).tolist() == list(range(70_000, 70_010))


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_kth_best_is_the_sorted_kth(values, data):
    k = data.draw(st.integers(1, len(values)))
    assert kth_best(torch.tensor(values, dtype=torch.float32), k).item() == sorted(values, reverse=True)[k - 1]


VALUES = st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 0.5, 2.0, torch.inf])


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_rows_at_once_are_rows_one_by_one(num_rows, num_values, data):
    values = torch.tensor(data.draw(st.lists(VALUES, min_size=num_rows * num_values, max_size=num_rows * num_values)))
    values_KN, k = values.view(num_rows, num_values), data.draw(st.integers(0, num_values))
    with NoWaiting():
        index_KX = top_of_rows(values_KN, k)
    assert index_KX.dtype == torch.int64
    assert index_KX.tolist() == [top_indices(values_N, k).tolist() for values_N in values_KN]


def test_long_rows_at_once():
    values_KN = torch.zeros(3, 100_000)
    values_KN[1, 70_000:70_063] = 1.0
    values_KN[2] = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).mul(100).round()
    for k in (10, 100, 50_000, 100_000):
        assert top_of_rows(values_KN, k).tolist() == [top_indices(values_N, k).tolist() for values_N in values_KN]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_mean_nothing_have_indices_that_exist(bad):
    """What they are used for fails later; the memory that they point into is ours until then."""
    values_KN = torch.full((2, 50), bad)
    values_KN[0, 10:] = 1.0
    index_KX = top_of_rows(values_KN, 20)
    assert index_KX.shape == (2, 20)
    assert ((index_KX >= 0) & (index_KX < 50)).all()
