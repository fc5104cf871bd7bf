import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import Candidates
from packlight.compress.budget import Site
from packlight.compress.budgets.ada import AdaBudget, blend
from packlight.compress.budgets.cake import CakeBudget, shares
from packlight.compress.budgets.mass import MassBudget
from packlight.compress.budgets.pyramid import PyramidBudget, schedule
from packlight.compress.budgets.rocket import RocketBudget, read_dims, split
from packlight.core.types import PackSpec


def scored(scores_KN, window, *, mass_KS=None, weight=1.0, layer=0, num_layers=1):
    scores_KN = torch.as_tensor(scores_KN, dtype=torch.float32)
    num_heads, num_prefix = scores_KN.shape
    mass_KS = torch.ones(num_heads, num_prefix + window) if mass_KS is None else torch.as_tensor(mass_KS)
    return Candidates(Site(layer, num_layers, num_heads), num_prefix + window, scores_KN, mass_KS, weight)


# ── PyramidKV ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_tokens", "budget", "window", "beta", "expected"),
    [
        (1000, 250, 32, 20, [426, 322, 218, 114, 10]),  # 218 a layer: 218 // 20 = 10, 2 * 218 - 10 = 426
        (410, 232, 32, 20, [378, 289, 200, 111, 22]),  # no more than the prefix of 378 in the first layer
        (399, 232, 32, 20, [200] * 5),  # shorter than twice the mean
        (1000, 250, 32, 1, [218] * 5),
        (1000, 101, 32, 20, [135, 102, 69, 36, 3]),
        (1000, 102, 32, 20, [137, 104, 71, 38, 5]),  # 134 / 4 is rounded down: 5 tokens above 5 * 70
    ],
)
def test_pyramid_schedule_by_hand(num_tokens, budget, window, beta, expected):
    sites = [Site(layer, 5, 2) for layer in range(5)]
    assert [schedule(num_tokens, budget, window, beta, site) for site in sites] == expected


def test_pyramid_of_one_layer_is_even():
    assert schedule(1000, 250, 32, 20, Site(0, 1, 2)) == 218


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 40),
    sinks=st.integers(0, 8),
    window=st.integers(1, 40),
    room=st.integers(1, 500),
    beyond=st.integers(1, 2000),
    beta=st.integers(1, 60),
)
def test_pyramid_descends_about_its_mean(num_layers, sinks, window, room, beyond, beta):
    budget = sinks + window + room
    num_tokens = budget + beyond
    spec = PackSpec("pyramidkv", budget, window=window, sinks=sinks, params=(("beta", beta),))
    kept = [PyramidBudget().max_kept(spec, num_tokens, Site(layer, num_layers, 2)) for layer in range(num_layers)]
    raised = sum(max(0, sinks + window + 1 - length) for length in kept)
    assert kept == sorted(kept, reverse=True)
    assert sinks + window + 1 <= kept[-1]
    assert kept[0] <= num_tokens
    # The step's rounding gives layer l up to l tokens, and no layer is left without room for a scored token.
    assert raised == 0
    assert num_layers * budget <= sum(kept)
    assert sum(kept) <= num_layers * (budget + num_layers / 2 + sinks + 1)


# ── Ada-KV ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wins", "base", "safe", "expected"),
    [
        ([20, 10, 0], 10, 0, [20, 10, 0]),
        ([20, 10, 0], 10, 10, [10, 10, 10]),
        ([20, 10, 0], 10, 2, [18, 10, 2]),
        ([7, 5, 3], 5, 1, [7, 5, 3]),  # 5.6, 4, 2.4 and 1 each: the token left over goes to the largest remainder
        ([6, 6, 3], 5, 1, [6, 6, 3]),  # 4.8, 4.8, 2.4
        ([5, 5, 5], 5, 1, [5, 5, 5]),
        ([4, 4, 7, 1], 4, 1, [4, 4, 6, 2]),  # 3, 3, 5.25, 0.75
    ],
)
def test_ada_blend_by_hand(wins, base, safe, expected):
    assert blend(wins, base, safe) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 10), st.floats(0, 1))
def test_ada_blend_conserves_the_total_and_stays_near_the_published_quota(wins, extra, alpha):
    base = -(-sum(wins) // len(wins)) + extra
    wins = [*wins[:-1], wins[-1] + len(wins) * base - sum(wins)]
    safe = int(alpha * base)
    lengths = blend(wins, base, safe)
    assert sum(lengths) == len(wins) * base
    for won, length in zip(wins, lengths, strict=True):
        assert length >= safe
        assert abs(length - (safe + won * (base - safe) / base)) < 1


def test_ada_counts_each_head_among_the_best_of_the_layer():
    candidates = scored([[9, 8, 7, 6, 0, 0], [5, 1, 1, 1, 1, 1]], window=2)
    spec = PackSpec("adakv", 4, window=2, sinks=0, params=(("alpha", 0.0),))
    assert AdaBudget().allot(spec, candidates) == [2 + 4, 2 + 0]  # the best four are all head 0's
    assert AdaBudget().allot(PackSpec("adakv", 5, window=2, sinks=0, params=(("alpha", 0.0),)), candidates) == [6, 4]
    assert AdaBudget().allot(PackSpec("adakv", 4, window=2, sinks=0, params=(("alpha", 1.0),)), candidates) == [4, 4]


def test_ada_ties_go_to_the_lower_head():
    candidates = scored([[1, 1, 1, 1], [1, 1, 1, 1]], window=1)
    spec = PackSpec("adakv", 3, window=1, sinks=0, params=(("alpha", 0.0),))
    assert AdaBudget().allot(spec, candidates) == [1 + 4, 1 + 0]


def test_ada_bound_is_reached_by_the_most_one_sided_scores():
    scores_KN = torch.zeros(3, 200)
    scores_KN[0] = 1.0
    scores_KN[:, :4] = torch.inf
    spec = PackSpec("adakv", 40, window=8)
    lengths = AdaBudget().allot(spec, scored(scores_KN, window=8))
    assert max(lengths) == AdaBudget().max_kept(spec, 208, Site(0, 1, 3))
    assert sum(lengths) == AdaBudget().max_kept_in_layer(spec, 208, Site(0, 1, 3)) == 120


# ── CAKE ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("weights", "total", "least", "most", "expected"),
    [
        ([1, 1, 1], 30, 1, 100, [10, 10, 10]),
        ([3, 2, 1], 60, 1, 100, [30, 20, 10]),
        ([1, 1, 1], 32, 1, 100, [11, 11, 10]),  # what rounding lost goes to the lower layers
        ([8, 1, 1], 60, 1, 30, [30, 15, 15]),  # 48, 6, 6: the 18 too many are spread evenly
        ([8, 2, 1, 1], 60, 1, 30, [30, 14, 8, 8]),  # 40, 10, 5, 5 and 10 more
        ([8, 2, 1, 1], 61, 1, 30, [30, 15, 8, 8]),  # 40, 10, 5, 5: first the 10 too many, then the one rounding lost
        ([20, 15, 1], 72, 1, 30, [30, 30, 12]),  # 40, 30, 2: only the last layer has room
        ([100, 1, 1], 30, 5, 100, [20, 5, 5]),  # 29, 0, 0: the others need five each
        ([0, 0, 0], 30, 1, 100, [10, 10, 10]),
        ([5], 7, 1, 9, [7]),
    ],
)
def test_cake_shares_by_hand(weights, total, least, most, expected):
    assert shares(weights, total, least=least, most=most) == expected


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 300), st.data())
def test_cake_shares_are_exact(weights, least, more, data):
    most = least + more
    total = data.draw(st.integers(least * len(weights), most * len(weights)))
    lengths = shares(weights, total, least=least, most=most)
    assert sum(lengths) == total
    assert all(least <= length <= most for length in lengths)


def test_cake_divides_among_the_layers_it_is_given():
    layers = [scored(torch.zeros(2, 92), 8, weight=weight, layer=layer) for layer, weight in ((0, 3.0), (2, 1.0))]
    lengths = CakeBudget().divide(PackSpec("cake", 28, window=8), layers)
    assert lengths == [[8 + 30, 8 + 30], [8 + 10, 8 + 10]]


# ── mass ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (PackSpec("mass", window=1, sinks=0, params=(("target", 0.8),)), [3, 5]),
        (PackSpec("mass", 4, window=1, sinks=0, params=(("target", 0.8),)), [3, 4]),
        (PackSpec("mass", window=1, sinks=2, params=(("target", 0.8),)), [4, 5]),
        (PackSpec("mass", window=1, sinks=0, params=(("target", 0.01),)), [2, 2]),
    ],
)
def test_mass_keeps_as_many_as_retain_the_target(spec, expected):
    """Of 10, 8 are wanted: 2 in the window and 5 + 1 (head 0), or 4 * 1.5 (head 1)."""
    mass_KS = [[5, 1, 0.5, 0.5, 0.5, 0.5, 2], [1.5, 1.5, 1.5, 1.5, 1, 1, 2]]
    candidates = scored([row[:-1] for row in mass_KS], 1, mass_KS=mass_KS)
    assert MassBudget().allot(spec, candidates) == expected


# ── RocketKV ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_tokens", "budget", "factor", "num_kept", "sparsity", "page_size", "num_dims", "num_read", "share"),
    [
        (4096, 256, 0.44, 1209, 4.72, 3, 81, 128, 29.5),
        (4096, 1024, 0.32, 2628, 2.57, 2, 99, 512, 64.2),
        (16384, 512, 0.50, 2896, 5.66, 3, 67, 256, 17.7),
        (32768, 512, 0.56, 3191, 6.23, 3, 61, 256, 9.7),
        (32768, 1024, 0.50, 5792, 5.66, 3, 67, 512, 17.7),
        (65536, 1024, 0.56, 6382, 6.23, 3, 61, 512, 9.7),
        (131072, 256, 0.74, 1296, 5.06, 3, 75, 128, 1.0),
        (131072, 1024, 0.62, 6472, 6.32, 3, 60, 512, 4.9),
    ],
)
def test_rocket_split_is_the_published_one(
    num_tokens, budget, factor, num_kept, sparsity, page_size, num_dims, num_read, share
):
    parts = split(num_tokens, budget, head_dim=128, num_new_tokens=128)
    assert parts.factor == pytest.approx(factor)
    assert parts.sparsity == pytest.approx(sparsity, abs=0.005)
    assert (parts.num_kept, parts.page_size, parts.num_dims, parts.num_read) == (
        num_kept,
        page_size,
        num_dims,
        num_read,
    )
    assert round(100 * parts.num_kept / num_tokens, 1) == share


def test_rocket_leaves_room_for_a_long_answer():
    assert split(1000, 50, head_dim=128, num_new_tokens=300).num_kept == 600
    assert split(1000, 50, head_dim=128, num_new_tokens=800).num_kept == 1000
    assert split(1000, 1000, head_dim=128) == (0.2, 1000, 1.0, 1, 128, 500)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 20_000))
def test_rocket_keeps_between_the_budget_and_the_prompt(room, beyond):
    spec, num_tokens = PackSpec("rocketkv", 36 + room), 36 + room + beyond
    kept = RocketBudget().max_kept(spec, num_tokens, Site(0, 4, 2))
    assert 36 + room <= kept <= num_tokens


def test_dims_of_a_page_estimate():
    spec = PackSpec("rocketkv", 256)
    assert read_dims(spec, 4096, page_size=3, head_dim=128) == 81  # the published page: see the table above
    assert read_dims(spec, 4096, page_size=1, head_dim=128) == 27
    assert read_dims(spec, 4096, page_size=16, head_dim=128) == 128
    assert read_dims(spec, 200, page_size=1, head_dim=64) == 64
    assert read_dims(spec, 10**9, page_size=1, head_dim=2) == 1
