from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress import window
from packlight.compress.base import LayerView
from packlight.compress.recipes import RECIPES
from packlight.compress.select import Selector, read_masses, select
from packlight.compress.window import window_attention
from packlight.core.errors import InternalError
from packlight.core.types import PackSpec
from tests.support.packing import make_layers, make_view, naive_mass, select_all
from tests.support.tape import NoWaiting


def slow_snapkv(view: LayerView, spec: PackSpec, kernel: int) -> tuple[list[list[float]], list[list[int]]]:
    """SnapKV by the book, one token at a time: (scores of the prefix, kept indices), per KV head."""
    mass_KS, num_prefix = naive_mass(view).tolist(), view.num_tokens - spec.window
    scores, kept = [], []
    for mass_S in mass_KS:
        pooled = []
        for token in range(num_prefix):
            first, last = max(0, token - kernel // 2), min(num_prefix - 1, token + kernel // 2)
            pooled.append(max(mass_S[first : last + 1]))
        best = sorted(range(spec.sinks, num_prefix), key=lambda token: (-pooled[token], token))
        best = best[: spec.budget_tokens - spec.window - spec.sinks]
        scores.append(pooled)
        kept.append([*range(spec.sinks), *sorted(best), *range(num_prefix, view.num_tokens)])
    return scores, kept


def assert_same_but_for_rounding(kept, expected, scores):
    """Equal, or differing only in tokens whose fp64 scores are within rounding of one another."""
    swapped = [scores[token] for token in set(kept) ^ set(expected)]
    assert len(kept) == len(expected)
    assert not swapped or max(swapped) - min(swapped) <= 1e-5 * max(swapped) + 1e-7


@settings(deadline=None)
@given(
    num_tokens=st.integers(30, 120),
    window=st.integers(1, 9),
    sinks=st.integers(0, 5),
    room=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 31, 63]),
    seed=st.integers(0, 5),
)
def test_snapkv_equals_the_slow_one(num_tokens, window, sinks, room, kernel, seed):
    budget = min(sinks + window + room, num_tokens - 1)
    view = make_view(num_tokens, window, seed=seed)
    spec = PackSpec("snapkv", budget, window=window, sinks=sinks, kernel=kernel)
    scores, expected = slow_snapkv(view, spec, kernel)
    selection = select(view, spec, num_tokens=num_tokens)
    for head, index in enumerate(selection.indices):
        assert_same_but_for_rounding(index.tolist(), expected[head], scores[head])


def test_snapkv_without_rounding_trouble_is_exactly_the_slow_one():
    """One dominant key per head, so that plateaus of pooled scores are exact and ties go to the lower index."""
    view = make_view(200, 8)
    view.k_KSD.zero_()
    view.q_WHD.fill_(1.0)
    view.k_KSD[0, 90], view.k_KSD[1, 150] = 5.0, 5.0
    spec = PackSpec("snapkv", 8 + 4 + 20, window=8, kernel=31)
    _, expected = slow_snapkv(view, spec, 31)
    assert expected[0][4:24] == list(range(75, 95))  # the first 20 of the plateau 75 .. 105
    assert [index.tolist() for index in select(view, spec, num_tokens=200).indices] == expected


@pytest.mark.parametrize("kernel", [5, 63])
def test_only_a_wide_kernel_keeps_the_rest_of_an_answer(kernel):
    """The window attends to an answer's first token; the seven after it are needed later."""
    view = make_view(400, 32)
    view.k_KSD.mul_(0.01)
    view.q_WHD.fill_(1.0)
    view.k_KSD[:, 200] = 5.0
    index = select(view, PackSpec("snapkv", 100, kernel=kernel), num_tokens=400).indices[0].tolist()
    assert ({*range(200, 208)} <= set(index)) == (kernel == 63)


def test_streaming_llm_keeps_sinks_and_the_most_recent():
    selection = select(make_view(100, 8), PackSpec("streaming_llm", 30, window=8), num_tokens=102)
    expected = [*range(4), *range(74, 102)]
    assert [index.tolist() for index in selection.indices] == [expected, expected]


def test_none_does_not_look_at_queries_or_keys():
    view = LayerView(torch.full((1, 6, 8), torch.nan), torch.full((2, 20, 8), torch.nan), 1.0, 0, 1)
    selection = select(view, PackSpec("none"), num_tokens=22)
    assert selection.lengths() == [22, 22]
    assert selection.retained_mass == 1.0


def test_one_token_above_the_budget():
    view = make_view(65, 32)
    selection = select(view, PackSpec("snapkv", 64), num_tokens=65)
    assert selection.lengths() == [64, 64]


def test_retained_mass_is_the_kept_share_of_the_attention():
    view, spec = make_view(120, 8), PackSpec("snapkv", 40, window=8, kernel=5)
    selection, mass_KS = select(view, spec, num_tokens=125), naive_mass(view)
    shares = [
        sum(mass_KS[head, token].item() for token in index.tolist() if token < 120) / mass_KS[head].sum().item()
        for head, index in enumerate(selection.indices)
    ]
    assert selection.retained_mass == pytest.approx(sum(shares) / 2, abs=1e-6)
    recent = select(view, PackSpec("streaming_llm", 40, window=8), num_tokens=125)
    assert recent.retained_mass < selection.retained_mass


def test_a_scorer_is_given_the_log_sum_exp(monkeypatch):
    """It is computed once per layer, however many passes follow."""
    calls = []
    monkeypatch.setattr(window, "window_attention", lambda *args: calls.append(1) or window_attention(*args))
    monkeypatch.setattr(window, "window_lse", lambda *args, **kwargs: pytest.fail("computed again"))
    select(make_view(100, 8), PackSpec("cake", 40, window=8), num_tokens=100)
    assert calls == [1]


def test_layers_wait_only_where_they_compete():
    views = make_layers(100, 8, 4)
    for name, expected in (("snapkv", [[0], [1], [2], [3]]), ("cake", [[], [], [], [0, 1, 2, 3]])):
        selector = Selector(PackSpec(name, 40, window=8), num_prompt_tokens=100, num_tokens=100)
        assert [[layer for layer, _ in selector.add(view)] for view in views] == expected


def test_layers_come_out_in_order_though_some_know_their_length_at_once():
    selector = Selector(PackSpec("cake", 40, window=8), num_prompt_tokens=100, num_tokens=100)
    windows = (20, None, 20, None, 20)
    ready = [selector.add(view, window) for view, window in zip(make_layers(100, 8, 5), windows, strict=True)]
    assert [[layer for layer, _ in step] for step in ready] == [[0], [], [], [], [1, 2, 3, 4]]
    lengths = [selection.lengths() for step in ready for _, selection in step]
    assert lengths[0] == lengths[2] == lengths[4] == [20, 20]
    assert sum(lengths[1]) + sum(lengths[3]) == 2 * 2 * 40


def test_layers_that_compete_share_one_total():
    lengths = [selection.lengths() for selection in select_all(make_layers(200, 8, 6), PackSpec("cake", 40, window=8))]
    assert sum(map(sum, lengths)) == 6 * 2 * 40
    assert len({heads[0] for heads in lengths}) > 1


def test_a_floor_grows_only_what_falls_short():
    view, spec = make_view(200, 8), PackSpec("snapkv", 20, window=8, kernel=1)
    plain = select(view, spec, num_tokens=200)
    mass_KS = naive_mass(view)
    grown = select(view, replace(spec, mass_floor=0.9), num_tokens=200)
    shares = [(mass_S[index].sum() / mass_S.sum()).item() for mass_S, index in zip(mass_KS, grown.indices, strict=True)]
    assert plain.retained_mass < 0.9 <= min(shares)
    assert grown.num_grown == sum(grown.lengths()) - 40 > 0
    unmoved = select(view, replace(spec, mass_floor=plain.retained_mass), num_tokens=200)
    assert unmoved.lengths() == plain.lengths()


def test_log_sum_exp_of_the_backend_gives_the_same_selection():
    view, spec = make_view(300, 8), PackSpec("snapkv", 60, window=8, kernel=3)
    scores_HWS = view.scale * torch.einsum("whd,hsd->hws", view.q_WHD, view.k_KSD.repeat_interleave(3, dim=0))
    hidden_WS = torch.ones(8, 300, dtype=torch.bool).triu(300 - 8 + 1)
    lse_WH = scores_HWS.masked_fill(hidden_WS, -torch.inf).logsumexp(dim=-1).T
    helped = LayerView(view.q_WHD, view.k_KSD, view.scale, view.layer, view.num_layers, lse_WH)
    pairs = zip(select(helped, spec, num_tokens=300).indices, select(view, spec, num_tokens=300).indices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ── reading late ─────────────────────────────────────────────────────────────────────────────────────────────────────

DROPPING = [name for name, recipe in RECIPES.items() if recipe.drops_tokens]


def select_late(views, spec):
    """Every layer's selection, read late."""
    num_tokens = views[0].num_tokens
    selector = Selector(spec, num_prompt_tokens=num_tokens, num_tokens=num_tokens + 3, reads_late=True)
    return [selection for view in views for _, selection in selector.add(view)]


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("floor", [0.0, 0.9])
def test_what_is_read_late_is_the_same_selection(name, floor):
    views, spec = make_layers(200, 8, 4), PackSpec(name, 60, window=8, kernel=5, mass_floor=floor)
    late, early = select_late(views, spec), select_all(views, spec, num_tokens=203)
    for ours, theirs in zip(late, early, strict=True):
        assert [index.tolist() for index in ours.indices] == [index.tolist() for index in theirs.indices]
        assert ours.num_grown == theirs.num_grown
    masses = read_masses([(layer, selection.retained_mass) for layer, selection in enumerate(late)])
    assert masses == pytest.approx([selection.retained_mass for selection in early], abs=1e-9)


@pytest.mark.parametrize("name", ["snapkv", "rocketkv", "streaming_llm", "pyramidkv", "h2o"])
def test_nothing_waits_where_lengths_are_known_beforehand(name):
    views, spec = make_layers(200, 8, 4), PackSpec(name, 60, window=8)
    with NoWaiting():
        late = select_late(views, spec)
    assert len(late) == 4
    with NoWaiting(), pytest.raises(RuntimeError, match="waits for the device"):
        select_all(views, spec)


@pytest.mark.parametrize("name", DROPPING)
def test_attention_that_is_not_finite_is_told_in_the_end_and_of_the_first_such_layer(name):
    views = make_layers(200, 8, 4)
    views[1].k_KSD[1, 30], views[2].q_WHD[0, 0, 0] = torch.nan, torch.inf
    late = select_late(views, PackSpec(name, 60, window=8))
    assert all(index.min() >= 0 and index.max() < 203 for selection in late for index in selection.indices)
    masses = [(layer, selection.retained_mass) for layer, selection in enumerate(late)]
    assert [mass.isfinite().item() for _, mass in masses] == [True, False, False, True]
    with pytest.raises(InternalError, match="attention of layer 1 is not finite"):
        read_masses(masses)
    assert read_masses([masses[0], (7, 1.0)]) == [pytest.approx(masses[0][1].item()), 1.0]
    assert read_masses([]) == []
