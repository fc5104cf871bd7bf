import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.topk import kth_best, top_indices


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
