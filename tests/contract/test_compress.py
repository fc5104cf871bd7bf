"""What every recipe of the table owes: a new row of the table joins by itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.budget import Site, base_budget, max_kept, max_pages
from packlight.compress.layout import total_pages
from packlight.compress.pack import pack
from packlight.compress.recipes import BUDGETS, CODECS, READERS, RECIPES, SCORERS
from packlight.compress.select import select
from packlight.compress.window import window_mass
from packlight.core.types import ModelSpec, PackSpec
from tests.support.packing import make_view, permute_heads

DROPPING = [recipe.name for recipe in RECIPES.values() if recipe.drops_tokens]
HEADS, LAYERS = 2, 4

specs = st.builds(
    PackSpec,
    recipe=st.sampled_from(list(RECIPES)),
    window=st.integers(1, 12),
    sinks=st.integers(0, 6),
    kernel=st.sampled_from([None, 1, 3, 7, 63]),
)
budgets = st.one_of(
    st.tuples(st.integers(1, 90), st.none()),
    st.tuples(st.none(), st.floats(0.01, 1.0)),
)


def with_budget(spec, budget):
    """`resolve` refuses budgets below sinks + window + 1; the packing itself must survive them."""
    tokens, ratio = budget if RECIPES[spec.recipe].drops_tokens else (None, None)
    return PackSpec(spec.recipe, tokens, ratio, spec.window, spec.sinks, spec.kernel)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_parts_exist(recipe):
    for registry, name in ((SCORERS, recipe.scorer), (BUDGETS, recipe.budget)):
        assert (name is None) == (not recipe.drops_tokens)
        assert name is None or registry.load(name)()
    assert READERS.load(recipe.reader).name == recipe.reader
    assert CODECS.load(recipe.codec)()


@settings(deadline=None)
@given(specs, budgets, st.integers(1, 80), st.integers(0, 5), st.integers(0, 3))
def test_selection_invariants(spec, budget, anchor, num_later, seed):
    spec, num_tokens = with_budget(spec, budget), anchor + num_later
    view = make_view(anchor, spec.window, num_kv_heads=HEADS, seed=seed)
    selection = select(view, spec, num_tokens=num_tokens)
    bound = max_kept(spec, anchor, view.site)
    always = {*range(min(spec.sinks, anchor)), *range(max(0, anchor - spec.window), num_tokens)}
    assert bound <= anchor
    assert 0.0 <= selection.retained_mass <= 1.0
    assert len(selection.indices) == HEADS
    for index in selection.indices:
        kept = index.tolist()
        assert kept == sorted(set(kept))
        assert always <= set(kept) <= set(range(num_tokens))
        assert len(kept) - num_later <= bound
    assert [index.numel() for index in selection.indices] == selection.lengths()
    if base_budget(spec, anchor) >= anchor:
        assert selection.lengths() == [num_tokens] * HEADS


@settings(deadline=None)
@given(specs, budgets, st.integers(1, 80), st.integers(0, 9), st.sampled_from([1, 4, 16]))
def test_reserved_pages_suffice(spec, budget, anchor, num_later, page_size):
    spec = with_budget(spec, budget)
    windows = (None, 5, None, 70)
    model = ModelSpec("m", "f", LAYERS, HEADS, 8, 10, 100, (), "float32", windows)
    prompt_pages, all_pages = 0, 0
    for layer, sliding_window in enumerate(windows):
        view = make_view(anchor, spec.window, num_kv_heads=HEADS, seed=layer)
        lengths = select(view, spec, num_tokens=anchor, sliding_window=sliding_window).lengths()
        prompt_pages += total_pages(lengths, page_size)
        all_pages += total_pages([length + num_later for length in lengths], page_size)
        assert max(lengths) <= max_kept(spec, anchor, Site(layer, LAYERS, HEADS), sliding_window)
    assert prompt_pages <= max_pages(spec, model, anchor, page_size)
    assert all_pages <= max_pages(spec, model, anchor, page_size, num_new_tokens=num_later)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_budget_that_covers_the_prompt_is_exactly_none(name, extra):
    view = make_view(50, 8)
    whole = select(view, PackSpec("none"), num_tokens=53)
    budget = 50 + extra if RECIPES[name].drops_tokens else None
    selection = select(view, PackSpec(name, budget, window=8), num_tokens=53)
    assert selection.retained_mass == whole.retained_mass == 1.0
    assert all(torch.equal(a, b) for a, b in zip(selection.indices, whole.indices, strict=True))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_tokens", [40, 43])
def test_sliding_window_layer_keeps_what_it_can_see(name, num_tokens):
    budget = 20 if RECIPES[name].drops_tokens else None
    view = make_view(40, 8)
    view.q_WHD.fill_(torch.nan)  # nothing is preferred, so nothing is looked at
    for sliding_window, first in ((12, num_tokens - 12), (100, 0)):
        selection = select(view, PackSpec(name, budget, window=8), num_tokens=num_tokens, sliding_window=sliding_window)
        assert [index.tolist() for index in selection.indices] == [list(range(first, num_tokens))] * HEADS
        assert selection.retained_mass == 1.0


@pytest.mark.parametrize("name", DROPPING)
def test_kv_heads_are_independent(name):
    view, order = make_view(100, 8, num_kv_heads=4), [2, 0, 3, 1]
    spec = PackSpec(name, 30, window=8, kernel=3)
    straight = select(view, spec, num_tokens=100)
    permuted = select(permute_heads(view, order), spec, num_tokens=100)
    assert [index.tolist() for index in permuted.indices] == [straight.indices[head].tolist() for head in order]
    assert permuted.retained_mass == pytest.approx(straight.retained_mass, abs=1e-6)


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_the_tile(name, dtype):
    view, spec = make_view(100, 8, dtype=dtype), PackSpec(name, 30, window=8)
    scorer = SCORERS.load(RECIPES[name].scorer)()
    scores = [scorer.score(view, window_mass(view.q_WHD, view.k_KSD, view.scale, tile=t), spec) for t in (7, 64, 512)]
    assert all(score.dtype == torch.float32 and score.shape == (2, 92) for score in scores)
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


@pytest.mark.parametrize("name", DROPPING)
def test_bfloat16_selects_by_the_same_mass_as_its_float32_copy(name):
    low, spec = make_view(100, 8, dtype=torch.bfloat16), PackSpec(name, 30, window=8, kernel=3)
    exact = make_view(100, 8)
    exact.q_WHD.copy_(low.q_WHD)
    exact.k_KSD.copy_(low.k_KSD)
    pairs = zip(select(low, spec, num_tokens=100).indices, select(exact, spec, num_tokens=100).indices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_hold_what_was_selected(name, dtype):
    budget = 21 if RECIPES[name].drops_tokens else None
    view = make_view(60, 8, dtype=dtype)
    later_K3D = torch.randn(HEADS, 3, 8).to(dtype)
    k_KSD = torch.cat([view.k_KSD, later_K3D], dim=1)
    v_KSD = -k_KSD.flip(1)
    selection = select(view, PackSpec(name, budget, window=8), num_tokens=63)
    packed, page = pack(k_KSD, v_KSD, selection, 4), 0
    for head, length in enumerate(packed.lengths):
        num_pages = math.ceil(length / 4)
        for pages, source in ((packed.k_pages, k_KSD), (packed.v_pages, v_KSD)):
            slots = pages[page : page + num_pages].reshape(-1, 8)
            assert torch.equal(slots[:length], source[head, selection.indices[head]])
            assert not slots[length:].any()
        page += num_pages
    assert page == packed.num_pages
