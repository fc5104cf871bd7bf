import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import LayerView
from packlight.compress.window import TILE, window_mass
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
