import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import LayerView
from packlight.compress.scorers.window import pooling_kernel
from packlight.compress.select import select
from packlight.core.errors import InternalError
from packlight.core.types import PackSpec
from tests.support.packing import make_view, naive_mass


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


def test_default_kernel_narrows_with_the_budget():
    assert pooling_kernel(PackSpec("snapkv", 132), 1000) == 63
    assert pooling_kernel(PackSpec("snapkv", 131), 1000) == 31
    assert pooling_kernel(PackSpec("snapkv", ratio=0.1), 10_000) == 63
    assert pooling_kernel(PackSpec("snapkv", ratio=0.1), 1000) == 31
    assert pooling_kernel(PackSpec("snapkv", 64, kernel=7), 1000) == 7


def test_streaming_llm_keeps_sinks_and_the_most_recent():
    selection = select(make_view(100, 8), PackSpec("streaming_llm", 30, window=8), num_tokens=102)
    expected = [*range(4), *range(74, 102)]
    assert [index.tolist() for index in selection.indices] == [expected, expected]


def test_none_does_not_look_at_queries_or_keys():
    view = LayerView(torch.full((1, 6, 8), torch.nan), torch.full((2, 20, 8), torch.nan), 1.0, 0, 1)
    selection = select(view, PackSpec("none"), num_tokens=22)
    assert selection.lengths() == [22, 22]
    assert selection.retained_mass == 1.0


@pytest.mark.parametrize("recipe", ["snapkv", "streaming_llm"])
@pytest.mark.parametrize("num_tokens", [1, 3, 31, 32, 36, 37])
def test_prompts_shorter_than_window_and_sinks_are_kept_whole(recipe, num_tokens):
    view = make_view(num_tokens, 32)
    assert select(view, PackSpec(recipe, 37), num_tokens=num_tokens).lengths() == [num_tokens] * 2


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


@pytest.mark.parametrize("recipe", ["snapkv", "streaming_llm"])
def test_broken_attention_is_an_error_and_not_a_selection(recipe):
    view = make_view(100, 8)
    view.k_KSD[1, 50] = torch.nan
    with pytest.raises(InternalError, match="attention of layer 1 is not finite"):
        select(view, PackSpec(recipe, 40, window=8), num_tokens=100)


def test_log_sum_exp_of_the_backend_gives_the_same_selection():
    view, spec = make_view(300, 8), PackSpec("snapkv", 60, window=8, kernel=3)
    scores_HWS = view.scale * torch.einsum("whd,hsd->hws", view.q_WHD, view.k_KSD.repeat_interleave(3, dim=0))
    hidden_WS = torch.ones(8, 300, dtype=torch.bool).triu(300 - 8 + 1)
    lse_WH = scores_HWS.masked_fill(hidden_WS, -torch.inf).logsumexp(dim=-1).T
    helped = LayerView(view.q_WHD, view.k_KSD, view.scale, view.layer, view.num_layers, lse_WH)
    pairs = zip(select(helped, spec, num_tokens=300).indices, select(view, spec, num_tokens=300).indices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
