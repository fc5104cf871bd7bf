"""What every recipe of the table owes: a new row of the table joins by itself."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.budget import (
    base_budget,
    keeps_all,
    load_budget,
    max_kept,
    max_pages,
    max_pages_by_layer,
    read_budget,
)
from packlight.compress.layout import total_pages
from packlight.compress.pack import pack
from packlight.compress.parts import BUDGETS, CODECS, PARAMS, READERS, SCORERS
from packlight.compress.recipes import RECIPES
from packlight.compress.select import Selector, select
from packlight.compress.window import window_lse, window_mass
from packlight.core.errors import InternalError
from packlight.core.types import ModelSpec, PackSpec
from tests.support.packing import draw, make_layers, make_view, permute_heads, select_all, view_of

DROPPING = [recipe.name for recipe in RECIPES.values() if recipe.drops_tokens]
HEADS, LAYERS = 2, 4
ALL_FULL = (None,) * LAYERS
MIXED = (None, 5, None, 70)

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
    st.tuples(st.none(), st.none()),
)
layouts = st.sampled_from([ALL_FULL, MIXED, (70, 5, None, None)])


def with_budget(spec, budget):
    """`resolve` refuses budgets below sinks + window + 1; the packing itself must survive them."""
    tokens, ratio = budget if RECIPES[spec.recipe].drops_tokens else (None, None)
    return replace(spec, budget_tokens=tokens, ratio=ratio)


def budget_for(name, tokens):
    return tokens if RECIPES[name].drops_tokens else None


def indices_of(selections):
    return [[index.tolist() for index in selection.indices] for selection in selections]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_parts_exist(recipe):
    for registry, name in ((SCORERS, recipe.scorer), (BUDGETS, recipe.budget)):
        assert (name is None) == (not recipe.drops_tokens)
        assert name is None or registry.load(name)()
    assert READERS.load(recipe.reader)
    assert CODECS.load(recipe.codec)()


@settings(deadline=None, max_examples=150)
@given(specs, budgets, st.integers(1, 80), st.integers(0, 5), layouts, st.integers(0, 3))
def test_what_is_kept(spec, budget, anchor, num_later, sliding_windows, seed):
    spec, num_tokens = with_budget(spec, budget), anchor + num_later
    views = make_layers(anchor, spec.window, LAYERS, num_kv_heads=HEADS, seed=seed)
    selections = select_all(views, spec, num_tokens=num_tokens, sliding_windows=sliding_windows)
    always = {*range(min(spec.sinks, anchor)), *range(max(0, anchor - spec.window), num_tokens)}
    for view, selection, sliding_window in zip(views, selections, sliding_windows, strict=True):
        assert len(selection.indices) == HEADS
        assert selection.lengths() == [index.numel() for index in selection.indices]
        assert 0.0 <= selection.retained_mass <= 1.0
        assert selection.num_grown == 0
        for index in selection.indices:
            kept = index.tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= set(range(num_tokens))
            if sliding_window is not None:
                assert kept == list(range(max(0, num_tokens - sliding_window), num_tokens))
                continue
            assert always <= set(kept)
            assert len(kept) - num_later <= max_kept(spec, anchor, view.site) <= anchor
        if sliding_window is None and keeps_all(spec, anchor):
            assert selection.lengths() == [num_tokens] * HEADS
        if sliding_window is None and not keeps_all(spec, anchor):
            most = load_budget(spec).max_kept_in_layer(spec, anchor, view.site)
            assert sum(selection.lengths()) - HEADS * num_later <= most


@settings(deadline=None, max_examples=150)
@given(specs, budgets, st.integers(1, 80), st.integers(0, 9), st.sampled_from([1, 4, 16]), layouts)
def test_reserved_pages_suffice(spec, budget, anchor, num_later, page_size, sliding_windows):
    spec = with_budget(spec, budget)
    model = ModelSpec("m", "f", LAYERS, HEADS, 8, 10, 100, (), "float32", sliding_windows)
    views = make_layers(anchor, spec.window, LAYERS, num_kv_heads=HEADS)
    selections = select_all(views, spec, sliding_windows=sliding_windows)
    for num_new in (0, num_later):
        taken = [total_pages([n + num_new for n in selection.lengths()], page_size) for selection in selections]
        bounds = max_pages_by_layer(spec, model, anchor, page_size, num_new_tokens=num_new)
        together = max_pages(spec, model, anchor, page_size, num_new_tokens=num_new)
        assert all(pages <= bound for pages, bound in zip(taken, bounds, strict=True))
        assert sum(taken) <= together <= sum(bounds)


@settings(deadline=None, max_examples=150)
@given(specs, budgets, st.integers(1, 80), st.integers(0, 3), st.floats(0.0, 0.999), st.integers(0, 3))
def test_mass_floor_holds_in_every_layer(spec, budget, anchor, num_later, floor, seed):
    spec, num_tokens = with_budget(spec, budget), anchor + num_later
    views = make_layers(anchor, spec.window, LAYERS, num_kv_heads=HEADS, seed=seed)
    plain = select_all(views, spec, num_tokens=num_tokens)
    grown = select_all(views, replace(spec, mass_floor=floor), num_tokens=num_tokens)
    for before, after in zip(plain, grown, strict=True):
        assert after.retained_mass >= floor
        assert after.num_grown == sum(after.lengths()) - sum(before.lengths())
        assert (after.num_grown == 0) == (before.retained_mass >= floor)
        for few, more in zip(before.indices, after.indices, strict=True):
            assert set(few.tolist()) <= set(more.tolist())


@pytest.mark.parametrize("name", DROPPING)
def test_a_floor_is_not_exceeded_by_more_than_a_token_per_head(name):
    views = make_layers(120, 8, LAYERS, num_kv_heads=1)
    spec = PackSpec(name, 20, window=8, kernel=1, mass_floor=0.9)
    for view, selection in zip(views, select_all(views, spec), strict=True):
        if selection.num_grown:
            mass_S = window_mass(view.q_WHD, view.k_KSD, view.scale)[0]
            in_prefix = selection.indices[0][4:-8]  # without sinks, which may hold nothing
            assert selection.retained_mass - mass_S[in_prefix].max() / mass_S.sum() < 0.9


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_budget_that_covers_the_prompt_is_exactly_none(name, extra):
    views = make_layers(50, 8, LAYERS)
    whole = select_all(views, PackSpec("none"), num_tokens=53)
    for budget in ((50 + extra, None), (None, 1.0)):
        selections = select_all(views, with_budget(PackSpec(name, window=8), budget), num_tokens=53)
        assert indices_of(selections) == indices_of(whole)
        assert {selection.retained_mass for selection in (*selections, *whole)} == {1.0}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 31, 32, 36, 37])
def test_prompts_no_longer_than_window_and_sinks_are_kept_whole(name, num_tokens):
    for budget in ((37, None), (None, 0.1), (None, None)):
        selections = select_all(make_layers(num_tokens, 32, LAYERS), with_budget(PackSpec(name), budget))
        assert [selection.lengths() for selection in selections] == [[num_tokens] * HEADS] * LAYERS


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_step_reads_is_within_the_budget(name):
    for asked in (40, 300, 1000, 5000):
        spec = PackSpec(name, asked if RECIPES[name].has_budget else None)
        read = read_budget(spec, 1000)
        assert 1 <= read <= 1000
        if not RECIPES[name].reads_pages or asked >= 1000:
            assert read == 1000
        else:
            assert read <= min(asked, base_budget(spec, 1000))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_tokens", [40, 43])
def test_sliding_window_layer_keeps_what_it_can_see(name, num_tokens):
    view = make_view(40, 8)
    view.q_WHD.fill_(torch.nan)  # nothing is preferred, so nothing is looked at
    spec = PackSpec(name, budget_for(name, 20), window=8)
    for sliding_window, first in ((12, num_tokens - 12), (100, 0)):
        selection = select(view, spec, num_tokens=num_tokens, sliding_window=sliding_window)
        assert [index.tolist() for index in selection.indices] == [list(range(first, num_tokens))] * HEADS
        assert selection.retained_mass == 1.0


@pytest.mark.parametrize("name", DROPPING)
def test_heads_may_come_in_any_order(name):
    views, order = make_layers(100, 8, LAYERS, num_kv_heads=4), [2, 0, 3, 1]
    spec = PackSpec(name, 30, window=8, kernel=3)
    straight = select_all(views, spec)
    permuted = select_all([permute_heads(view, order) for view in views], spec)
    for before, after in zip(straight, permuted, strict=True):
        assert [index.tolist() for index in after.indices] == [before.indices[head].tolist() for head in order]
        assert after.retained_mass == pytest.approx(before.retained_mass, abs=1e-6)


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("cuts", [(1,), (50,), (16, 32, 48, 64, 80, 96), (7, 91)])
def test_chunks_of_the_prefill_do_not_matter(name, cuts):
    layers = [draw(100, seed=layer) for layer in range(LAYERS)]
    spec = PackSpec(name, 30, window=8, kernel=3)
    whole = [view_of(*qk, 8, layer=layer, num_layers=LAYERS) for layer, qk in enumerate(layers)]
    chunked = [view_of(*qk, 8, layer=layer, num_layers=LAYERS, cuts=cuts) for layer, qk in enumerate(layers)]
    assert indices_of(select_all(whole, spec)) == indices_of(select_all(chunked, spec))


@pytest.mark.parametrize("name", DROPPING)
def test_requests_of_a_batch_do_not_meet(name):
    """Selections of requests whose layers are added in turns are those that each makes alone."""
    spec, prompts = PackSpec(name, 30, window=8), [make_layers(100, 8, LAYERS, seed=seed) for seed in (1, 2)]
    selectors = [Selector(spec, num_prompt_tokens=100, num_tokens=100) for _ in prompts]
    found = [[], []]
    for views in zip(*prompts, strict=True):
        for place, (selector, view) in enumerate(zip(selectors, views, strict=True)):
            found[place] += [selection for _, selection in selector.add(view)]
    assert [indices_of(one) for one in found] == [indices_of(select_all(views, spec)) for views in prompts]


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_the_tile(name, dtype):
    view, spec = make_view(100, 8, dtype=dtype), PackSpec(name, 30, window=8)
    scorer = SCORERS.load(RECIPES[name].scorer)()
    results = []
    for tile in (7, 64, 512):
        lse_WH = window_lse(view.q_WHD, view.k_KSD, view.scale, tile=tile)
        mass_KS = window_mass(view.q_WHD, view.k_KSD, view.scale, lse_WH, tile=tile)
        results.append(scorer.score(replace(view, lse_WH=lse_WH), mass_KS, spec))
    for result in results:
        assert result.scores_KN.dtype == torch.float32
        assert result.scores_KN.shape == (HEADS, 92)
        assert result.layer_weight >= 0
        torch.testing.assert_close(result.scores_KN, results[0].scores_KN)
        assert result.layer_weight == pytest.approx(results[0].layer_weight, rel=1e-5)


@pytest.mark.parametrize("name", DROPPING)
def test_bfloat16_selects_by_the_same_mass_as_its_float32_copy(name):
    spec, low, exact = PackSpec(name, 30, window=8, kernel=3), [], []
    for layer in range(LAYERS):
        q_SHD, k_KSD = draw(100, dtype=torch.bfloat16, seed=layer)
        low.append(view_of(q_SHD, k_KSD, 8, layer=layer, num_layers=LAYERS))
        exact.append(view_of(q_SHD.float(), k_KSD.float(), 8, layer=layer, num_layers=LAYERS))
    assert indices_of(select_all(low, spec)) == indices_of(select_all(exact, spec))


@pytest.mark.parametrize("name", DROPPING)
def test_every_constant_that_says_what_to_keep_matters(name):
    """At one of its limits, at the least."""
    recipe, views = RECIPES[name], make_layers(150, 8, LAYERS)
    parts = (f"scorer:{recipe.scorer}", f"budget:{recipe.budget}")
    spec = PackSpec(name, 50, window=8, kernel=3)
    usual = indices_of(select_all(views, spec))
    for param in (param for part in parts for param in PARAMS.get(part, ()) if not param.is_flag):
        at_limits = [replace(spec, params=((param.name, value),)) for value in (param.low, param.high)]
        assert any(indices_of(select_all(views, other)) != usual for other in at_limits), param.name


@pytest.mark.parametrize("name", DROPPING)
def test_broken_attention_is_an_error_and_not_a_selection(name):
    view = make_view(100, 8)
    view.k_KSD[1, 50] = torch.nan
    with pytest.raises(InternalError, match="attention of layer 1 is not finite"):
        select(view, PackSpec(name, 40, window=8), num_tokens=100)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_hold_what_was_selected(name, dtype, page_size):
    view = make_view(60, 8, dtype=dtype)
    k_KSD = torch.cat([view.k_KSD, torch.randn(HEADS, 3, 8).to(dtype)], dim=1)
    v_KSD = -k_KSD.flip(1)
    selection = select(view, PackSpec(name, budget_for(name, 21), window=8), num_tokens=63)
    packed, page = pack(k_KSD, v_KSD, selection, page_size), 0
    for head, length in enumerate(packed.lengths):
        num_pages = math.ceil(length / page_size)
        for pages, source in ((packed.k_pages, k_KSD), (packed.v_pages, v_KSD)):
            slots = pages[page : page + num_pages].reshape(-1, 8)
            assert torch.equal(slots[:length], source[head, selection.indices[head]])
            assert not slots[length:].any()
        page += num_pages
    assert page == packed.num_pages
