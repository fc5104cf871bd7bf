import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import Candidates
from packlight.compress.budget import Site
from packlight.compress.coverage import retained_share, tokens_for_share


def candidates(scores_KN, mass_KS):
    scores_KN, mass_KS = torch.tensor(scores_KN, dtype=torch.float32), torch.tensor(mass_KS, dtype=torch.float32)
    return Candidates(Site(0, 1, len(mass_KS)), mass_KS.shape[1], scores_KN, mass_KS, 1.0)


def slow(scores_N, mass_S, share):
    window = len(mass_S) - len(scores_N)
    have, wanted = sum(mass_S[len(scores_N) :]), share * sum(mass_S)
    order = sorted(range(len(scores_N)), key=lambda token: (-scores_N[token], token))
    if have >= wanted:
        return window
    for token in order:
        have += mass_S[token]
        if have >= wanted:
            return window + sum(score >= scores_N[token] for score in scores_N)
    return len(mass_S)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 32), st.data())
def test_the_fewest_in_order_of_score_with_equal_scores_together(num_heads, num_prefix, window, share_32, data):
    """Masses and shares are small dyadic numbers, but a hair off the share, so that no sum is a near miss."""
    rows = st.lists(st.integers(0, 9), min_size=num_prefix + window, max_size=num_prefix + window)
    mass_KS = data.draw(st.lists(rows.filter(any), min_size=num_heads, max_size=num_heads))
    ranks = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf")]), min_size=num_prefix, max_size=num_prefix)
    scores_KN = data.draw(st.lists(ranks, min_size=num_heads, max_size=num_heads))
    share = max(0.0, share_32 / 32 - 1e-6)
    expected = [slow(scores_N, mass_S, share) for scores_N, mass_S in zip(scores_KN, mass_KS, strict=True)]
    assert tokens_for_share(candidates(scores_KN, mass_KS), share) == expected


def test_all_of_it_takes_what_has_any_and_nothing_the_window():
    layer = candidates([[1.0, 0.0, 0.0]], [[5.0, 0.0, 0.0, 1.0, 1.0]])
    assert tokens_for_share(layer, 1.0) == [3]
    assert tokens_for_share(layer, 0.0) == [2]


def test_retained_share_is_the_mean_over_heads():
    layer = candidates([[0.0] * 3] * 2, [[6.0, 2.0, 0.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert retained_share(layer, [torch.tensor([0]), torch.tensor([0, 2])]) == pytest.approx((0.8 + 0.8) / 2)
    assert retained_share(layer, [torch.tensor([0, 1, 2])] * 2) == 1.0
    assert retained_share(layer, [torch.tensor([], dtype=torch.int64)] * 2) == pytest.approx((0.2 + 0.4) / 2)
