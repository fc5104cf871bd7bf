"""The references themselves: against kvpress where it has the method, else against the papers' own numbers."""

import math
from functools import cache

import pytest

from tests.oracles import adakv, cake, h2o, hsa, pyramidkv, quest, recording, rocketkv, snapkv, streaming_llm
from tests.oracles.plain import best, causal_weights, kept

RECORDING = recording.load()
WINDOW, ADA_WINDOW, KERNEL = 32, 8, 5
CASES = [pytest.param(case, id=f"{case['method']}-{case['budget']}") for case in RECORDING.facts["cases"]]


@cache
def snapkv_scores(layer, window):
    """As kvpress has them: average pooling of each query head, mean over rows and group."""
    weights_HWS = causal_weights(RECORDING.queries(layer, window), RECORDING.keys(layer), RECORDING.scale)
    sums_KN = snapkv.scores(weights_HWS, 2, kernel=KERNEL, pooling="avg", pool_first=True)
    num_summed = window * len(weights_HWS) // 2
    return [[score / num_summed for score in sums_N] for sums_N in sums_KN]


@cache
def observed_scores(layer):
    """H2O's, divided by how many rows see the token; mean over the group."""
    weights_HSS = causal_weights(RECORDING.queries(layer), RECORDING.keys(layer), RECORDING.scale)
    num_tokens, group = RECORDING.num_tokens, len(weights_HSS) // 2
    sums_KS = h2o.accumulated(weights_HSS, 2)
    return [[score / (num_tokens - token) / group for token, score in enumerate(sums_S)] for sums_S in sums_KS]


def kept_of(case, layer):
    method, budget, num_tokens = case["method"], case["budget"], RECORDING.num_tokens
    if method == "streaming_llm":
        return [streaming_llm.kept(num_tokens, budget, 4)] * 2
    if method == "observed":
        return [best(scores_S, budget) for scores_S in observed_scores(layer)]
    if method.startswith("adakv"):
        above_all = [2.0] * ADA_WINDOW
        scores_KS = [scores_N + above_all for scores_N in snapkv_scores(layer, ADA_WINDOW)]
        return adakv.kvpress(scores_KS, budget, {"adakv": 0.2, "adakv_safe": 0.9}[method])
    if method == "pyramidkv":
        ratio = 1 - (budget + 0.5) / num_tokens
        budget = pyramidkv.kvpress(num_tokens, ratio, WINDOW, RECORDING.num_layers, beta=2)[layer]
    return [kept(scores_N, num_tokens, budget) for scores_N in snapkv_scores(layer, WINDOW)]


@pytest.mark.parametrize("layer", range(RECORDING.num_layers))
@pytest.mark.parametrize("case", CASES)
def test_keeps_what_kvpress_keeps(case, layer):
    assert kept_of(case, layer) == RECORDING.kept(case["method"], case["budget"], layer)


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_choices_are_not_decided_by_rounding(case):
    assert case["margin"] is None or case["margin"] > 1e-4
    assert case["drift"] < 1e-5


@pytest.mark.parametrize("layer", range(RECORDING.num_layers))
def test_scores_of_kvpress(layer):
    for head, expected_S in enumerate(RECORDING.arrays["scores_snapkv"][layer]):
        assert snapkv_scores(layer, WINDOW)[head] == pytest.approx(expected_S[:-WINDOW].tolist(), rel=2e-5)
    for head, expected_S in enumerate(RECORDING.arrays["scores_observed"][layer]):
        assert observed_scores(layer)[head] == pytest.approx(expected_S.tolist(), rel=2e-5)


@pytest.mark.parametrize("row", RECORDING.facts["pyramid_schedules"], ids=lambda row: row["call"])
def test_pyramid_schedules_of_kvpress(row):
    names = ("num_tokens", "ratio", "window", "num_layers", "beta")
    assert pyramidkv.kvpress(*(row[name] for name in names)) == row["budgets"]


def test_the_official_pyramid_is_kvpress_s_where_nothing_is_rounded():
    """Two things differ: the window comes on top of the authors' budgets and is inside kvpress's, and the authors do
    not taper a budget of more than half the prompt."""
    budgets = {}
    for row in RECORDING.facts["pyramid_schedules"]:
        window, mean = row["window"], round(row["num_tokens"] * (1 - row["ratio"]))
        if row["num_layers"] == 5:
            official = pyramidkv.official(row["num_tokens"], mean + window, window, 5, row["beta"])
            budgets[mean] = ([budget - window for budget in official], row["budgets"])
    assert budgets == {
        400: ([780, 590, 400, 210, 20],) * 2,
        480: ([898, 689, 480, 271, 62],) * 2,  # the first layer is clipped at the prompt
        600: ([600] * 5, [980, 790, 600, 410, 220]),
    }


# The table of published settings for d = 128 and 128 new tokens; S counts the new ones too.
@pytest.mark.parametrize(
    ("total", "tokens", "r", "cap", "c2", "page", "k1", "k2"),
    [
        (4096, 256, 0.44, 1209, 4.72, 3, 81, 128),
        (4096, 1024, 0.32, 2628, 2.57, 2, 99, 512),
        (16384, 512, 0.50, 2896, 5.66, 3, 67, 256),
        (32768, 512, 0.56, 3191, 6.23, 3, 61, 256),
        (32768, 1024, 0.50, 5792, 5.66, 3, 67, 512),
        (65536, 1024, 0.56, 6382, 6.23, 3, 61, 512),
        (131072, 256, 0.74, 1296, 5.06, 3, 75, 128),
        (131072, 1024, 0.62, 6472, 6.32, 3, 60, 512),
    ],
)
def test_rocketkv_split_gives_the_published_integers(total, tokens, r, cap, c2, page, k1, k2):
    split = rocketkv.split(total - 128, tokens, num_new=128, head_dim=128)
    assert (round(split.r, 2), split.cap, round(split.c2, 2)) == (r, cap, c2)
    assert (split.page, split.k1, split.k2) == (page, k1, k2)


def test_cake_shares_are_spread_as_stated():
    assert cake.allocate([1.0, 1.0, 1.0], 100, 10) == [10, 10, 10]
    assert cake.allocate([1.0, 1.0, 1.0, 97.0], 50, 20) == [10, 10, 10, 50]  # 27 clipped, 9 to each other layer
    assert cake.allocate([1.0, 1.0, 1.0], 100, 11) == [11, 11, 11]
    assert cake.allocate([2.0, 2.0, 3.0], 100, 10) == [9, 9, 12]  # int() loses nothing to spread here
    assert cake.allocate([1.0, 1.0, 5.0], 100, 10) == [5, 4, 21]  # 4.28 4.28 21.4: the token lost goes to layer 0


def test_ada_counts_by_hand():
    scores_KN = [[0.9, 0.8, 0.7, 0.1], [0.6, 0.2, 0.1, 0.0]]
    assert adakv.wins(scores_KN, 2) == [3, 1]
    assert adakv.official(scores_KN, 2, 0.0) == [3, 1]
    assert adakv.official(scores_KN, 2, 1.0) == [2, 2]
    assert adakv.official(scores_KN, 2, 0.5) == [2, 2]  # 1.5 + 1 and 0.5 + 1, half to even
    assert adakv.official(scores_KN, 5, 0.5) == [4, 4]


def test_a_quest_bound_is_reached_by_one_key_and_passed_by_none():
    keys = [[1.0, -2.0], [3.0, 0.5]]
    assert quest.bound([2.0, -1.0], keys) == 2 * 3 + 1 * 2
    for query in ([2.0, -1.0], [-1.0, -1.0], [0.3, 2.0]):
        dots = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        assert max(dots) <= quest.bound(query, keys) + 1e-12
        assert quest.bound(query, keys[:1]) == pytest.approx(dots[0])


def test_hsa_of_single_key_pages_with_all_dimensions_is_attention():
    queries, keys = [[1.0, -0.5], [0.2, 0.9]], [[0.3, 0.1], [-1.0, 2.0], [0.5, 0.5]]
    expected = [0.0] * 3
    for query in queries:
        weights = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(2)) for key in keys]
        expected = [total + weight / sum(weights) / 2 for total, weight in zip(expected, weights, strict=True)]
    assert hsa.page_scores(queries, [[key] for key in keys], 2, per_token=True) == pytest.approx(expected)
