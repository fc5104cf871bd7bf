"""The Triton kernels against their twins in torch."""

import pytest
import torch

from packlight.attention.flashinfer.bounds import compiled_products, gathered_products, has_triton
from packlight.compress.device_window import DeviceWindow, has_kernel
from packlight.compress.window import window_attention
from packlight.kv.pool import KVPool
from tests.support.packing import draw, view_of
from tests.support.page_bounds import ragged_bounds
from tests.support.paged_rows import model_spec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (96, 3), (128, 4), (128, 7), (256, 8)])
@pytest.mark.parametrize("num_pages", [1, 31, 32, 700])
def test_products_of_pages(dtype, head_dim, group, num_pages):
    """Pages that a head does not have are NaN, and neither read nor left undefined."""
    if not has_triton(torch.device("cuda")):
        pytest.skip("Triton is not installed")
    given, is_stored = ragged_bounds(dtype, head_dim, group, num_pages)
    got, expected = compiled_products(*(x.cuda() for x in given)).cpu(), gathered_products(*given)
    torch.testing.assert_close(got[is_stored], expected[is_stored], atol=1e-4, rtol=1e-5)
    assert not got[~is_stored].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "window", "num_kv_heads", "group", "head_dim", "page_size"),
    [
        (1, 1, 1, 1, 64, 16),
        (3000, 32, 8, 4, 128, 16),
        (700, 33, 2, 7, 96, 16),
        (129, 8, 3, 1, 256, 64),
        (40, 8, 1, 8, 40, 1),
    ],
)
def test_mass_of_the_window(dtype, num_tokens, window, num_kv_heads, group, head_dim, page_size):
    """Blocks in any order; what is not of the prompt is NaN, and neither read nor multiplied."""
    if not has_kernel(torch.device("cuda")):
        pytest.skip("Triton is not installed")
    view = view_of(*draw(num_tokens, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype), window)
    num_blocks = -(-num_tokens // page_size)
    spec = model_spec(3, num_kv_heads, head_dim)
    pool = KVPool(spec, num_blocks=num_blocks + 2, page_size=page_size, dtype=dtype, device="cuda")
    pool.k.fill_(torch.nan)
    blocks = torch.randperm(num_blocks + 2, generator=torch.Generator().manual_seed(1))[:num_blocks].cuda()
    tokens = torch.arange(num_tokens).cuda()
    pool.k[blocks[tokens // page_size], 1, :, tokens % page_size] = view.k_KSD.transpose(0, 1).cuda()
    expected = window_attention(view.q_WHD, view.k_KSD, view.scale)
    found = DeviceWindow(pool).attend(1, view.q_WHD.cuda(), blocks, num_tokens, view.scale, expected.lse_WH.cuda())
    torch.testing.assert_close(found.mass_KS.cpu(), expected.mass_KS, atol=1e-4, rtol=1e-4)
