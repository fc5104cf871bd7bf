import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress import accumulate
from packlight.compress.accumulate import AccumulatedMass
from tests.support.packing import draw, naive_mass, view_of

CPU = torch.device("cpu")


def accumulated(q_SHD, k_KSD, cuts=()):
    return view_of(q_SHD, k_KSD, 1, cuts=cuts).accumulated_KS


def slow(q_SHD, k_KSD):
    """A window of the whole prompt."""
    return naive_mass(view_of(q_SHD, k_KSD, q_SHD.shape[0]))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 69), max_size=4, unique=True))
def test_equals_the_column_sums_of_the_attention_matrix(num_tokens, num_kv_heads, group, cuts):
    q_SHD, k_KSD = draw(num_tokens, num_kv_heads=num_kv_heads, group=group)
    cuts = sorted(cut for cut in cuts if cut < num_tokens)
    result_KS = accumulated(q_SHD, k_KSD, cuts)
    assert result_KS.dtype == torch.float32
    torch.testing.assert_close(result_KS.double(), slow(q_SHD, k_KSD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_blocks_of_rows_do_not_matter(monkeypatch, rows):
    q_SHD, k_KSD = draw(300, head_dim=64)
    whole = accumulated(q_SHD, k_KSD)
    monkeypatch.setattr(accumulate, "MAX_ROWS", rows)
    monkeypatch.setattr(accumulate, "CPU_BLOCK_SCORES", rows * 3 * 300)
    torch.testing.assert_close(accumulated(q_SHD, k_KSD), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.double(), slow(q_SHD, k_KSD), atol=1e-5, rtol=1e-5)


def test_every_row_gives_all_of_its_mass():
    result_KS = accumulated(*draw(500, num_kv_heads=3, group=3, head_dim=64), cuts=(200, 333))
    torch.testing.assert_close(result_KS.sum(1), torch.full((3,), 1500.0), atol=1e-2, rtol=0)


def test_bfloat16_inputs_accumulate_in_float32():
    q_SHD, k_KSD = draw(200, dtype=torch.bfloat16)
    torch.testing.assert_close(accumulated(q_SHD, k_KSD).double(), slow(q_SHD, k_KSD), atol=1e-5, rtol=1e-4)


def test_large_scores_do_not_overflow():
    q_SHD, k_KSD = draw(100)
    q_SHD.mul_(1000)
    torch.testing.assert_close(accumulated(q_SHD, k_KSD).double(), slow(q_SHD, k_KSD), atol=1e-3, rtol=1e-3)


def test_layers_are_kept_apart_and_keys_may_be_strided():
    (q0, k0), (q1, k1) = draw(50, seed=0), draw(50, seed=1)
    sums = AccumulatedMass(2, 2, 60, CPU)
    for layer, q_SHD, k_KSD in ((1, q1, k1.transpose(0, 1).contiguous().transpose(0, 1)), (0, q0, k0)):
        sums.add(layer, q_SHD, k_KSD, 8**-0.5)
    torch.testing.assert_close(sums.layer(0)[:, :50], accumulated(q0, k0))
    torch.testing.assert_close(sums.layer(1)[:, :50], accumulated(q1, k1))
    assert not sums.layer(0)[:, 50:].any()
