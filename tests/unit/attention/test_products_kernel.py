"""The Triton kernel that scores pages, in Triton's interpreter; on a GPU, `tests/gpu/test_triton.py` runs it.

Triton decides when it is imported: `TRITON_INTERPRET=1 pytest` this file, with Triton installed.
"""

import importlib
import os
from importlib.util import find_spec

import pytest
import torch

from packlight.attention.flashinfer.bounds import gathered_products

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_dim", "group", "num_pages"), [(64, 1, 1), (96, 3, 33), (128, 4, 70), (40, 7, 5)])
def test_products_of_pages(dtype, head_dim, group, num_pages):
    """Pages that a head does not have are NaN, and neither read nor left undefined."""
    kernel = importlib.import_module("packlight.attention.flashinfer.products_kernel")
    generator = torch.Generator().manual_seed(num_pages)
    bounds = torch.randn(200, 2 * head_dim, generator=generator).to(dtype)
    bounds[100:] = torch.nan
    pages = torch.randint(100, (3, 2, num_pages), generator=generator, dtype=torch.int32)
    num_stored = torch.randint(1, num_pages + 1, (3, 2), generator=generator)
    is_stored = torch.arange(num_pages) < num_stored[..., None]
    pages[~is_stored] = 150
    probe = torch.randn(3, 2, group, 2 * head_dim, generator=generator)
    got, expected = (
        products(probe, bounds, pages, num_stored) for products in (kernel.page_products, gathered_products)
    )
    is_stored = is_stored[:, :, None].expand_as(got)
    torch.testing.assert_close(got[is_stored], expected[is_stored], atol=1e-4, rtol=1e-5)
    assert not got[~is_stored].any()
