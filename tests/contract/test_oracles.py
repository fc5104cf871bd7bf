"""Every recipe keeps what slow references written from the papers keep, and what kvpress keeps: the same tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import LayerView
from packlight.compress.budget import Site
from packlight.compress.budgets.ada import blend
from packlight.compress.budgets.cake import shares
from packlight.compress.budgets.rocket import split
from packlight.compress.parts import BUDGETS
from packlight.compress.recipes import RECIPES, find_recipe
from packlight.compress.select import Selector, keep, rate
from packlight.compress.topk import top_indices
from packlight.core.types import PackSpec, Pooling
from tests.oracles import cake, recording, rocketkv
from tests.oracles.expected import EXPECTED, Prompt, budget_near
from tests.support.packing import make_view

RECORDING = recording.load()
LAYERS = range(RECORDING.num_layers)
RECORDED = Prompt(
    [RECORDING.queries(layer) for layer in LAYERS], [RECORDING.keys(layer) for layer in LAYERS], RECORDING.scale
)


def random_prompt(num_tokens=160, num_layers=4, num_kv_heads=2, group=3, head_dim=8, seed=0):
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    views = [make_view(num_tokens, num_tokens, seed=seed + layer, **shape) for layer in range(num_layers)]
    return Prompt([view.q_WHD for view in views], [view.k_KSD for view in views], head_dim**-0.5)


PROMPTS = {
    "recorded": RECORDED,
    "random": random_prompt(),
    "one-layer": random_prompt(num_layers=1, num_kv_heads=4, group=1, seed=10),
    "one-kv-head": random_prompt(num_tokens=97, num_layers=3, num_kv_heads=1, group=4, seed=20),
}


def views_of(prompt, spec):
    for layer, (q_SHD, k_KSD) in enumerate(zip(prompt.q_LSHD, prompt.k_LKSD, strict=True)):
        view = LayerView(q_SHD[-spec.window :], k_KSD, prompt.scale, layer, prompt.num_layers)
        if find_recipe(spec.recipe).needs_all_queries:
            mass = AccumulatedMass(1, prompt.num_kv_heads, prompt.num_tokens, torch.device("cpu"))
            mass.add(0, q_SHD, k_KSD, prompt.scale)
            view = replace(view, accumulated_KS=mass.layer(0))
        yield view


def kept_by_us(prompt, spec):
    selector, kept = Selector(spec, num_prompt_tokens=prompt.num_tokens, num_tokens=prompt.num_tokens), {}
    for view in views_of(prompt, spec):
        for layer, selection in selector.add(view):
            kept[layer] = [index.tolist() for index in selection.indices]
    return [kept[layer] for layer in range(prompt.num_layers)]


def spec_of(recipe, budget, **options):
    options = {"window": 8, "kernel": 5, **options}
    params = tuple(sorted(options.pop("params", {}).items()))
    return PackSpec(recipe, budget, params=params, **options)


def test_every_recipe_that_drops_tokens_has_an_oracle():
    assert set(EXPECTED) == {name for name, recipe in RECIPES.items() if recipe.drops_tokens}


@pytest.mark.parametrize("options", [{}, {"sinks": 0, "pooling": Pooling.AVG}, {"kernel": 31}], ids=repr)
@pytest.mark.parametrize("budget", [30, 57])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("recipe", EXPECTED)
def test_keeps_what_the_reference_keeps(recipe, prompt, budget, options):
    spec, expected = budget_near(recipe, PROMPTS[prompt], spec_of(recipe, budget, **options))
    assert kept_by_us(PROMPTS[prompt], spec) == expected


@pytest.mark.parametrize(
    ("recipe", "budget", "options"),
    [
        ("streaming_llm", 20, {"window": 1}),
        ("h2o", 40, {"params": {"recent": 0.0}}),
        ("h2o", 40, {"params": {"recent": 0.9}}),
        ("h2o", 40, {"params": {"recent": 1.0}}),
        ("h2o", 120, {"params": {"recent": 0.25}, "window": 1, "sinks": 0}),
        ("h2o_pyramid", 60, {"params": {"beta": 2}}),
        ("snapkv", 40, {"window": 1, "kernel": 1}),
        ("snapkv", 150, {"window": 32, "kernel": 63}),
        ("pyramidkv", 40, {"params": {"beta": 2}}),
        ("pyramidkv", 24, {"params": {"beta": 20}, "sinks": 12}),  # the last layer is raised to its least
        ("pyramidkv", 86, {"params": {"beta": 20}}),  # the first layer is clipped at the prompt
        ("pyramidkv", 110, {"params": {"beta": 20}}),  # more than half the prompt: even
        ("adakv", 40, {"params": {"alpha": 0.0}}),
        ("adakv", 40, {"params": {"alpha": 0.55}}),
        ("adakv", 40, {"params": {"alpha": 1.0}}),
        ("adakv", 90, {"params": {"alpha": 0.2}, "sinks": 0, "window": 16}),
        ("cake", 40, {"params": {"gamma": 0.0}}),
        ("cake", 40, {"params": {"tau1": 0.4, "tau2": 0.6}}),
        ("cake", 120, {"params": {"tau1": 0.5, "tau2": 0.2}, "kernel": None}),  # layers are clipped at the prompt
        ("rocketkv", 40, {"kernel": 63, "window": 32, "sinks": 0}),
        ("rocketkv", 100, {"kernel": 63, "window": 32}),
        ("mass", 150, {"params": {"target": 0.5}, "kernel": 1}),
        ("mass", 150, {"params": {"target": 0.99}, "kernel": 1, "sinks": 0}),
    ],
    ids=repr,
)
def test_constants_mean_what_they_mean_in_the_reference(recipe, budget, options):
    spec, expected = budget_near(recipe, PROMPTS["random"], spec_of(recipe, budget, **options))
    assert kept_by_us(PROMPTS["random"], spec) == expected


@pytest.mark.parametrize("target", [0.3, 0.8, 0.97])
def test_mass_without_a_budget_finds_its_own_length(target):
    spec = spec_of("mass", None, params={"target": target}, kernel=1)
    expected = EXPECTED["mass"](PROMPTS["random"], spec)
    assert kept_by_us(PROMPTS["random"], spec) == expected
    assert len({len(tokens) for tokens_K in expected for tokens in tokens_K}) > 1


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    num_prefix=st.integers(5, 400),
    share=st.floats(0.01, 1.0),
    least=st.integers(0, 5),
)
def test_cake_divides_as_the_reference_does(weights, num_prefix, share, least):
    base = max(1, least, int(share * num_prefix))
    ours = shares(weights, base * len(weights), least=least, most=num_prefix)
    assert ours == cake.allocate(weights, num_prefix, base, least)


@given(num_tokens=st.integers(2, 200_000), budget=st.integers(1, 200_000), num_new=st.sampled_from([0, 1, 128, 4096]))
def test_rocketkv_splits_as_the_reference_does(num_tokens, budget, num_new):
    assume(budget <= num_tokens and num_new < num_tokens)
    ours = split(num_tokens, budget, head_dim=128, num_new_tokens=num_new)
    assert ours == rocketkv.split(num_tokens - num_new, budget, num_new=num_new, head_dim=128)


@settings(deadline=None)
@given(
    wins=st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(lambda wins: sum(wins) % len(wins) == 0),
    alpha=st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0]),
)
def test_ada_rounds_as_published_where_that_keeps_the_total(wins, alpha):
    """Where the sure share is whole, ours is within a token of the published rounding, and equal if that adds up."""
    base = sum(wins) // len(wins)
    assume(base > 0 and (alpha * base).is_integer())
    published = [round(count * (1 - alpha) + int(base * alpha)) for count in wins]
    ours = blend(wins, base, int(alpha * base))
    assert sum(ours) == sum(wins)
    assert all(abs(a - b) <= 1 for a, b in zip(ours, published, strict=True))
    has_halves = any((count * (1 - alpha)) % 1 == 0.5 for count in wins)
    assert has_halves or sum(published) != sum(wins) or ours == published


# Against kvpress itself. Each test names what is switched off to compare like with like.


@pytest.mark.parametrize("budget", [64, 150])
def test_snapkv_keeps_what_kvpress_keeps(budget):
    """kvpress forces no sinks and pools by average."""
    spec = spec_of("snapkv", budget, window=32, sinks=0, pooling=Pooling.AVG)
    assert kept_by_us(RECORDED, spec) == [RECORDING.kept("snapkv", budget, layer) for layer in LAYERS]


@pytest.mark.parametrize("budget", [64, 150])
@pytest.mark.parametrize("window", [1, 32])
def test_streaming_llm_keeps_what_kvpress_keeps(budget, window):
    """Whatever the window: it lies within the most recent tokens."""
    spec = spec_of("streaming_llm", budget, window=window, sinks=4)
    assert kept_by_us(RECORDED, spec) == [RECORDING.kept("streaming_llm", budget, layer) for layer in LAYERS]


@pytest.mark.parametrize("budget", [64, 150])
def test_accumulated_mass_ranks_as_kvpress_does(budget):
    """kvpress divides by the number of rows that see a token, and forces neither sinks nor recent tokens."""
    num_visible_S = torch.arange(RECORDING.num_tokens, 0, -1)
    for layer, view in enumerate(views_of(RECORDED, spec_of("h2o", budget))):
        observed_KS = view.accumulated_KS / num_visible_S
        kept = [top_indices(observed_S, budget).tolist() for observed_S in observed_KS]
        assert kept == RECORDING.kept("observed", budget, layer)


@pytest.mark.parametrize("budget", [64, 150])
def test_pyramidkv_keeps_what_kvpress_keeps(budget):
    """Under kvpress's lengths, which are rounded reals with the window inside."""
    spec = spec_of("pyramidkv", budget, window=32, sinks=0, pooling=Pooling.AVG)
    for layer, view in enumerate(views_of(RECORDED, spec)):
        expected = RECORDING.kept("pyramidkv", budget, layer)
        selection = keep(rate(view, spec), [len(tokens) for tokens in expected], spec, RECORDING.num_tokens)
        assert [index.tolist() for index in selection.indices] == expected


@pytest.mark.parametrize("budget", [64, 150])
def test_adakv_keeps_what_kvpress_keeps(budget):
    """kvpress protects a share of each head and then takes the best of all; Ada-KV's authors mix the two in one sum. A
    share that binds nowhere leaves only the competition, which is alpha 0 here."""
    spec = spec_of("adakv", budget, window=8, sinks=0, pooling=Pooling.AVG, params={"alpha": 0.0})
    assert kept_by_us(RECORDED, spec) == [RECORDING.kept("adakv", budget, layer) for layer in LAYERS]


@pytest.mark.parametrize(("mean", "expected"), [(400, [780, 590, 400, 210, 20]), (480, [898, 689, 480, 271, 62])])
def test_pyramid_budgets_are_kvpress_s_where_nothing_is_rounded(mean, expected):
    """The window comes on top here, as with the authors."""
    (row,) = [row for row in RECORDING.facts["pyramid_schedules"] if row["budgets"] == expected]
    window, num_tokens, beta = row["window"], row["num_tokens"], row["beta"]
    spec = spec_of("pyramidkv", mean + window, window=window, sinks=0, params={"beta": beta})
    budget = BUDGETS.load("pyramid")()
    sites = [Site(layer, row["num_layers"], 2) for layer in range(row["num_layers"])]
    assert [budget.max_kept(spec, num_tokens, site) - window for site in sites] == expected
