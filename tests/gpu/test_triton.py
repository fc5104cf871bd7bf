"""The Triton kernel against its twin in torch."""

import pytest
import torch

from packlight.attention.flashinfer.bounds import compiled_products, gathered_products, has_triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (96, 3), (128, 4), (128, 7), (256, 8)])
@pytest.mark.parametrize("num_pages", [1, 31, 32, 700])
def test_products_of_pages(dtype, head_dim, group, num_pages):
    """Pages that a head does not have are NaN, and neither read nor left undefined."""
    if not has_triton(torch.device("cuda")):
        pytest.skip("Triton is not installed")
    generator = torch.Generator().manual_seed(num_pages)
    bounds = torch.randn(2000, 2 * head_dim, generator=generator).to(dtype)
    bounds[1000:] = torch.nan
    pages = torch.randint(1000, (3, 2, num_pages), generator=generator, dtype=torch.int32)
    num_stored = torch.randint(1, num_pages + 1, (3, 2), generator=generator)
    is_stored = torch.arange(num_pages) < num_stored[..., None]
    pages[~is_stored] = 1500
    probe = torch.randn(3, 2, group, 2 * head_dim, generator=generator)
    given = [x.cuda() for x in (probe, bounds, pages, num_stored)]
    got, expected = compiled_products(*given).cpu(), gathered_products(probe, bounds, pages, num_stored)
    is_stored = is_stored[:, :, None].expand_as(got)
    torch.testing.assert_close(got[is_stored], expected[is_stored], atol=1e-4, rtol=1e-5)
    assert not got[~is_stored].any()
