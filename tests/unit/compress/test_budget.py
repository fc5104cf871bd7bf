import pytest

from packlight.compress import budget as budgets
from packlight.compress.budget import (
    Site,
    base_budget,
    keeps_all,
    max_kept,
    max_pages,
    max_pages_by_layer,
    read_budget,
)
from packlight.compress.layout import pages_of, total_pages
from packlight.compress.recipes import RECIPES
from packlight.core.types import ModelSpec, PackSpec

SITE = Site(layer=0, num_layers=2, num_kv_heads=3)


def model(windows=()):
    return ModelSpec("m", "f", 2, 3, 8, 10, 1000, (), "float32", windows)


@pytest.mark.parametrize(
    ("spec", "num_tokens", "kept"),
    [
        (PackSpec("none"), 1000, 1000),
        (PackSpec("none", budget_tokens=5), 1000, 1000),
        (PackSpec("snapkv"), 1000, 1000),
        (PackSpec("snapkv", budget_tokens=128), 1000, 128),
        (PackSpec("snapkv", budget_tokens=128), 127, 127),
        (PackSpec("snapkv", budget_tokens=128), 128, 128),
        (PackSpec("snapkv", budget_tokens=5), 1000, 37),
        (PackSpec("snapkv", ratio=0.25), 1000, 250),
        (PackSpec("snapkv", ratio=0.25), 1001, 251),
        (PackSpec("snapkv", ratio=0.25), 100, 37),
        (PackSpec("snapkv", ratio=0.25), 20, 20),
        (PackSpec("snapkv", ratio=1.0), 1000, 1000),
        (PackSpec("snapkv", ratio=0.07, window=1, sinks=0), 100, 7),  # 0.07 * 100 is a hair above 7 in binary
    ],
)
def test_base_budget(spec, num_tokens, kept):
    assert base_budget(spec, num_tokens) == kept
    assert max_kept(spec, num_tokens, SITE) == kept
    assert keeps_all(spec, num_tokens) == (kept == num_tokens)


def test_sliding_window_bounds_the_layer_whatever_the_recipe():
    for spec in (PackSpec("none"), PackSpec("snapkv", 64)):
        assert max_kept(spec, 1000, SITE, sliding_window=512) == 512
        assert max_kept(spec, 40, SITE, sliding_window=512) == 40


def test_pages():
    assert [pages_of(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert total_pages([1, 16, 17, 0], 16) == 4


def test_max_pages_by_hand():
    assert max_pages(PackSpec("none"), model(), 100, 16) == 2 * 3 * 7
    assert max_pages(PackSpec("snapkv", 40), model(), 100, 16) == 2 * 3 * 3
    assert max_pages(PackSpec("snapkv", 40), model((None, 20)), 100, 16) == 3 * 3 + 3 * 2
    assert max_pages(PackSpec("none"), model((None, 20)), 100, 16) == 3 * 7 + 3 * 2


def test_new_tokens_fill_the_last_page_first():
    spec = PackSpec("snapkv", 40)
    assert max_pages(spec, model(), 100, 16, num_new_tokens=8) == max_pages(spec, model(), 100, 16)
    assert max_pages(spec, model(), 100, 16, num_new_tokens=9) == 2 * 3 * 4


class CompetingBudget:
    """Heads share 3 x 40 tokens; any one may take nearly all of them. (The shape of Ada-KV's promise.)"""

    def max_kept(self, spec, num_tokens, site):
        return 90

    def max_kept_in_layer(self, spec, num_tokens, site):
        return 120


def test_a_budget_whose_heads_compete_reserves_by_the_layer(monkeypatch):
    monkeypatch.setattr(budgets, "load_budget", lambda spec: CompetingBudget())
    # (120 + 3 * 15) // 16 = 10 pages always suffice; 3 heads of 90 tokens would reserve 18.
    assert max_pages(PackSpec("snapkv", 40), model(), 100, 16) == 2 * 10
    worst = max(total_pages([a, b, 120 - a - b], 16) for a in range(31) for b in range(91 - a) if 120 - a - b <= 90)
    assert worst == 10


def test_layers_that_compete_reserve_together():
    spec = PackSpec("cake", 40, window=8)
    assert max_pages_by_layer(spec, model(), 1000, 16) == [3 * 5, 3 * 5]  # one layer: 13 + 2 * 27 = 67 tokens at most
    assert max_pages(spec, model(), 1000, 16) == (2 * 3 * 40 + 6 * 15) // 16
    assert max_pages(spec, model(), 1000, 16, num_new_tokens=20) == (2 * 3 * 60 + 6 * 15) // 16
    assert max_pages(spec, model((None, 20)), 1000, 16) == (3 * 40 + 3 * 15) // 16 + 3 * 2
    assert max_pages(spec, model((30, 20)), 1000, 16) == 3 * 2 + 3 * 2
    assert max_pages(spec, model(), 40, 16) == 2 * 3 * 3


def test_a_recipe_that_finds_its_length_is_no_identity_unless_asked_to_keep_all():
    assert not keeps_all(PackSpec("mass"), 1000)
    assert base_budget(PackSpec("mass"), 1000) == 1000
    assert keeps_all(PackSpec("mass"), 37)
    assert keeps_all(PackSpec("mass", 1000), 1000)
    assert keeps_all(PackSpec("mass", ratio=1.0), 1000)
    assert keeps_all(PackSpec("snapkv"), 1000)


@pytest.mark.parametrize(
    ("spec", "num_read"),
    [
        (PackSpec("none"), 1000),
        (PackSpec("snapkv", 100), 1000),
        (PackSpec("quest", 100), 100),
        (PackSpec("quest", 5000), 1000),
        (PackSpec("freekv", ratio=0.125), 125),
        (PackSpec("rocketkv", 100), 50),
        (PackSpec("rocketkv", ratio=0.25), 125),
        (PackSpec("rocketkv", ratio=0.001), 18),  # half of 4 sinks + 32 window + 1
        (PackSpec("rocketkv", 1000), 1000),
    ],
)
def test_read_budget(spec, num_read):
    assert read_budget(spec, 1000) == num_read


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.divides_layers])
def test_layers_that_are_said_to_be_alike_are(name):
    """Only one of them is asked about, so a budget that looks at the layer's place must say so."""
    spec, windows = PackSpec(name, budget_tokens=128, window=16), (None, 64, None, 64, None, None)
    deep = ModelSpec("m", "f", 6, 3, 8, 10, 4000, (), "float32", windows)
    one_by_one = [
        total_pages([max_kept(spec, 2000, Site(layer, 6, 3), window) + 20] * 3, 16)
        for layer, window in enumerate(windows)
    ]
    by_layer = max_pages_by_layer(spec, deep, 2000, 16, num_new_tokens=20)
    if RECIPES[name].divides_heads:  # there the layer has a bound of its own, not each head's times their number
        assert len({pages for pages, window in zip(by_layer, windows, strict=True) if window is None}) == 1
    else:
        assert by_layer == one_by_one
