from dataclasses import replace

import pytest
import torch

from packlight.compress.scorers.accumulated import AccumulatedScorer
from packlight.compress.scorers.cake import CakeScorer
from packlight.compress.scorers.window import pooled, pooling_kernel
from packlight.compress.select import select
from packlight.compress.window import window_mass
from packlight.core.types import PackSpec, Pooling
from tests.support.packing import make_view, naive_attention


def mass(view):
    return window_mass(view.q_WHD, view.k_KSD, view.scale)


def test_default_kernel_narrows_with_the_budget():
    assert pooling_kernel(PackSpec("snapkv", 132), 1000) == 63
    assert pooling_kernel(PackSpec("snapkv", 131), 1000) == 31
    assert pooling_kernel(PackSpec("snapkv", ratio=0.1), 10_000) == 63
    assert pooling_kernel(PackSpec("snapkv", ratio=0.1), 1000) == 31
    assert pooling_kernel(PackSpec("snapkv", 64, kernel=7), 1000) == 7


@pytest.mark.parametrize(("recent", "first_recent"), [(0.0, 92), (0.2, 92), (0.5, 80), (0.75, 70), (1.0, 64)])
def test_h2o_keeps_a_share_of_recent_tokens_and_the_heaviest_of_the_rest(recent, first_recent):
    """Of 40 tokens, 4 are sinks and 8 the window, which counts as recent."""
    view = make_view(100, 8)
    selection = select(view, PackSpec("h2o", 40, window=8, params=(("recent", recent),)), num_tokens=100)
    for mass_S, index in zip(view.accumulated_KS, selection.indices, strict=True):
        middle = mass_S[4:first_recent].argsort(descending=True)[: 40 - 4 - (100 - first_recent)] + 4
        assert index.tolist() == [*range(4), *sorted(middle.tolist()), *range(first_recent, 100)]


def test_h2o_takes_its_share_of_the_layers_own_budget():
    """A pyramid's last layer keeps less than the recent tokens of the mean layer; they must not crowd out the rest."""
    view = make_view(400, 8, layer=3)
    selection = select(view, PackSpec("h2o_pyramid", 100, window=8), num_tokens=400)
    for mass_S, index in zip(view.accumulated_KS, selection.indices, strict=True):
        heaviest = mass_S[4:392].argsort(descending=True)[:2] + 4
        # 92 // 20 = 4 is raised to 4 sinks + 1, and steps round in its favour.
        assert index.tolist() == [*range(4), *sorted(heaviest.tolist()), *range(392, 400)]


def test_cake_scores_and_weight_by_the_book():
    view, spec = make_view(60, 8), PackSpec("cake", 20, window=8, params=(("tau1", 1.6), ("tau2", 0.4)))
    scored = CakeScorer().score(view, mass(view), spec)
    weights_HWN = naive_attention(view)[:, :, :52]
    per_head = weights_HWN.mean(1) + 200 * weights_HWN.var(1)
    expected = pooled(per_head, 5, Pooling.AVG).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(scored.scores_KN.double(), expected, atol=1e-6, rtol=1e-5)
    dispersion = -(weights_HWN * (weights_HWN + 1e-10).log()).sum().item()
    shift = weights_HWN.var(1).sum().item()
    assert scored.layer_weight == pytest.approx(dispersion ** (1 / 1.6) * shift ** (1 / 0.4), rel=1e-4)


def test_cake_kernel_and_gamma():
    view = make_view(60, 8)
    plain = CakeScorer().score(view, mass(view), PackSpec("cake", kernel=1, params=(("gamma", 0.0),), window=8))
    torch.testing.assert_close(plain.scores_KN, mass(view)[:, :52] / (8 * 3))


def test_cake_with_a_single_row_has_no_shift():
    view = make_view(60, 1)
    scored = CakeScorer().score(view, mass(view), PackSpec("cake", 20, window=1))
    assert scored.layer_weight == 0.0
    assert not scored.scores_KN.isnan().any()


def test_scorers_leave_the_view_as_it_was():
    view, spec = make_view(60, 8), PackSpec("h2o", 20, window=8)
    before = view.accumulated_KS.clone()
    AccumulatedScorer().score(view, mass(view), spec)
    select(replace(view), spec, num_tokens=60)
    assert torch.equal(view.accumulated_KS, before)
