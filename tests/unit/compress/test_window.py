import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import LayerView
from packlight.compress.window import TILE, window_lse, window_mass, window_spread
from tests.support.packing import make_view, naive_attention, naive_mass


def mass(view, **options):
    return window_mass(view.q_WHD, view.k_KSD, view.scale, **options)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 3), st.integers(1, 4))
def test_equals_materialised_softmax(num_tokens, window, tile, num_kv_heads, group):
    view = make_view(num_tokens, window, num_kv_heads=num_kv_heads, group=group)
    result_KS = mass(view, tile=tile)
    assert result_KS.dtype == torch.float32
    torch.testing.assert_close(result_KS.double(), naive_mass(view), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [TILE - 1, TILE, TILE + 1, 3 * TILE + 16])
def test_at_the_default_tile(num_tokens):
    view = make_view(num_tokens, 32, head_dim=64, group=3, num_kv_heads=3)
    torch.testing.assert_close(mass(view).double(), naive_mass(view), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass(view).sum(dim=1), torch.full((3,), 96.0), atol=1e-3, rtol=0)


def test_bfloat16_inputs_accumulate_in_float32():
    view = make_view(900, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(mass(view).double(), naive_mass(view), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tile", [16, 512])
def test_given_log_sum_exp_replaces_the_first_pass(tile):
    view = make_view(200, 8)
    group = view.q_WHD.shape[1] // view.k_KSD.shape[0]
    score_HW = view.scale * torch.einsum("whd,hd->hw", view.q_WHD, view.k_KSD[:, 0].repeat_interleave(group, dim=0))
    lse_WH = (score_HW - naive_attention(view)[:, :, 0].log()).T.float()  # p = exp(score - lse), solved for key 0
    torch.testing.assert_close(mass(view, lse_WH=lse_WH, tile=tile), mass(view), atol=1e-4, rtol=1e-4)


def test_large_scores_do_not_overflow():
    view = make_view(100, 8)
    view.q_WHD.mul_(1000)
    torch.testing.assert_close(mass(view, tile=16).double(), naive_mass(view), atol=1e-3, rtol=1e-3)


def test_strided_keys():
    view = make_view(100, 8)
    strided_KSD = view.k_KSD.transpose(0, 1).contiguous().transpose(0, 1)
    strided = LayerView(view.q_WHD, strided_KSD, view.scale, 0, 1)
    assert not strided_KSD.is_contiguous()
    torch.testing.assert_close(mass(strided, tile=32), mass(view, tile=32))


@settings(deadline=None)
@given(st.integers(2, 70), st.integers(1, 40), st.integers(1, 90), st.integers(1, 3), st.integers(1, 4))
def test_spread_equals_that_of_a_materialised_softmax(num_tokens, window, tile, num_kv_heads, group):
    view = make_view(num_tokens, min(window, num_tokens - 1), num_kv_heads=num_kv_heads, group=group)
    spread = window_spread(view.q_WHD, view.k_KSD, view.scale, tile=tile)
    weights_HWN = naive_attention(view)[:, :, : num_tokens - view.q_WHD.shape[0]]
    num_rows = weights_HWN.shape[1]
    variance_HN = weights_HWN.var(1) if num_rows > 1 else torch.zeros_like(weights_HWN[:, 0])
    expected_KN = variance_HN.unflatten(0, (num_kv_heads, group)).sum(1)
    torch.testing.assert_close(spread.variance_KN.double(), expected_KN, atol=1e-6, rtol=1e-4)
    assert spread.entropy == pytest.approx(torch.special.entr(weights_HWN).sum().item(), abs=1e-4, rel=1e-4)


def test_spread_of_attention_that_hardly_varies():
    """Weights that differ in their last bits have a variance of that size: a difference of squares would have 1e-7."""
    view = make_view(2000, 32)
    view.q_WHD.fill_(1.0)
    view.k_KSD[:, 1968:] = -50.0  # unseen, or later rows would see more keys and give each of them less
    spread = window_spread(view.q_WHD, view.k_KSD, view.scale)
    weight_KN = mass(view)[:, :1968] / 96
    assert (spread.variance_KN <= 3 * (1e-6 * weight_KN) ** 2).all()


def test_entropy_of_attention_to_one_key_is_not_negative():
    """Given a log-sum-exp that is rounded down, a weight comes out above 1, and a root of its entropy complex."""
    view = make_view(60, 8)
    view.k_KSD.zero_()
    view.q_WHD.fill_(1.0)
    view.k_KSD[:, 20] = 40.0
    lse_WH = window_lse(view.q_WHD, view.k_KSD, view.scale) - 1e-4
    assert window_spread(view.q_WHD, view.k_KSD, view.scale, lse_WH).entropy == 0.0


def test_log_sum_exp_by_row_and_head():
    view = make_view(100, 8)
    weights_HWS = naive_attention(view)
    keys_HD = view.k_KSD[:, 0].repeat_interleave(3, dim=0)
    first_WH = view.scale * torch.einsum("whd,hd->wh", view.q_WHD, keys_HD)
    expected_WH = first_WH.double() - weights_HWS[:, :, 0].T.log()
    for tile in (7, 512):
        lse_WH = window_lse(view.q_WHD, view.k_KSD, view.scale, tile=tile)
        torch.testing.assert_close(lse_WH.double(), expected_WH, atol=1e-4, rtol=1e-4)
