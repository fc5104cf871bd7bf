"""The native window attention against the torch one, on every instruction set that this machine runs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packlight.compress.base import LayerView
from packlight.compress.paged_window import PagedWindow
from packlight.compress.select import select
from packlight.compress.window import window_attention
from packlight.core.types import PackSpec
from packlight.kv.pool import KVPool
from packlight.models.fake_spec import fake_spec
from packlight.native.compile import NativeUnavailable
from tests.support.native import VARIANTS, open_variant
from tests.support.packing import draw, naive_attention, naive_mass, view_of

LAYERS, LAYER = 3, 1


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def library(request):
    try:
        return open_variant(request.param)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def stored(k_KSD, page_size=4):
    """A pool that holds the keys in shuffled blocks of one layer, and NaN everywhere else."""
    num_heads, num_tokens, head_dim = k_KSD.shape
    spec = replace(fake_spec(), num_layers=LAYERS, num_kv_heads=num_heads, head_dim=head_dim)
    num_blocks = -(-num_tokens // page_size)
    pool = KVPool(spec, num_blocks=num_blocks + 2, page_size=page_size, dtype=k_KSD.dtype)
    pool.k.fill_(torch.nan)
    blocks = torch.randperm(num_blocks + 2, generator=torch.Generator().manual_seed(1))[:num_blocks]
    tokens = torch.arange(num_tokens)
    pool.k[blocks[tokens // page_size], LAYER, :, tokens % page_size] = k_KSD.transpose(0, 1)
    return pool, blocks


def attend(library, view, lse_WH=None, **options):
    pool, blocks = stored(view.k_KSD, **options)
    return PagedWindow(pool, library).attend(LAYER, view.q_WHD, blocks, view.num_tokens, view.scale, lse_WH)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(1, 600),
    window=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([1, 8, 24, 64]),
    page_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_a_materialised_softmax(library, num_tokens, window, num_kv_heads, group, head_dim, page_size, dtype):
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "dtype": dtype}
    view = view_of(*draw(num_tokens, **shape), window)
    mass_KS, lse_WH = attend(library, view, page_size=page_size)
    assert (mass_KS.dtype, lse_WH.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(mass_KS.double(), naive_mass(view), atol=2e-5, rtol=2e-5)
    again = attend(library, view, lse_WH, page_size=page_size)
    assert torch.equal(again.lse_WH, lse_WH)
    torch.testing.assert_close(again.mass_KS.double(), naive_mass(view), atol=2e-5, rtol=2e-5)
    key_HD = view.k_KSD[:, 0].double().repeat_interleave(group, dim=0)
    first_WH = view.scale * torch.einsum("whd,hd->wh", view.q_WHD.double(), key_HD)
    weight_WH = naive_attention(view)[:, :, 0].T
    seen = weight_WH > 1e-30
    torch.testing.assert_close(lse_WH.double()[seen], (first_WH - weight_WH.log())[seen], atol=1e-4, rtol=1e-4)


def test_large_scores_do_not_overflow(library):
    view = view_of(*draw(700), 8)
    view.q_WHD.mul_(1000)
    torch.testing.assert_close(attend(library, view).mass_KS.double(), naive_mass(view), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention_that_is_not_finite_shows(library, bad):
    view = view_of(*draw(600), 8)
    view.k_KSD[1, 300] = bad
    found = attend(library, view)
    for mass_KS in (found.mass_KS, attend(library, view, found.lse_WH).mass_KS):
        assert mass_KS[0].isfinite().all()
        assert not mass_KS[1].sum().isfinite()


def test_strided_queries(library):
    view = view_of(*draw(100), 8)
    wide_WHD = torch.randn(8, 6, 16)
    wide_WHD[..., :8] = view.q_WHD
    strided = LayerView(wide_WHD[..., :8], view.k_KSD, view.scale, 0, 1)
    assert torch.equal(attend(library, strided).mass_KS, attend(library, view).mass_KS)


def test_the_same_bits_on_any_number_of_threads(library):
    view = view_of(*draw(2000, head_dim=32), 16)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found = attend(library, view)
        results.append((*found, attend(library, view, found.lse_WH).mass_KS))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(got, first) for got, first in zip(result, results[0], strict=True))


def test_a_log_sum_exp_that_is_given_is_believed(library):
    """It scales each row's weights, and is of the rows and heads it is said to be of."""
    view = view_of(*draw(300), 8)
    found = attend(library, view)
    more_WH = torch.rand(found.lse_WH.shape, generator=torch.Generator().manual_seed(0))
    attention_HWS = naive_attention(view) * more_WH.T.double()[..., None].neg().exp()
    expected_KS = attention_HWS.sum(dim=1).unflatten(0, (2, -1)).sum(dim=1)
    mass_KS = attend(library, view, found.lse_WH + more_WH).mass_KS
    torch.testing.assert_close(mass_KS.double(), expected_KS, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "mass", "cake", "pyramidkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selection_is_that_of_torch(library, name, dtype):
    view, spec = view_of(*draw(400, head_dim=32, dtype=dtype), 16), PackSpec(name, 80, window=16)
    mass_KS, lse_WH = attend(library, view)
    known = LayerView(view.q_WHD, view.k_KSD, view.scale, 1, 4, lse_WH=lse_WH, mass_KS=mass_KS)
    ours, torchs = (select(each, spec, num_tokens=400) for each in (known, view))
    assert all(torch.equal(a, b) for a, b in zip(ours.indices, torchs.indices, strict=True))
    assert ours.retained_mass == pytest.approx(torchs.retained_mass, abs=1e-6)


def test_the_torch_path_agrees_on_a_long_prompt(library):
    view = view_of(*draw(5000, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16), 32)
    found, expected = attend(library, view, page_size=16), window_attention(view.q_WHD, view.k_KSD, view.scale)
    torch.testing.assert_close(found.mass_KS, expected.mass_KS, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse_WH, expected.lse_WH, atol=1e-5, rtol=1e-5)
