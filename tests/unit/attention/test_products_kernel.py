"""The Triton kernel that scores pages, in Triton's interpreter; on a GPU, `tests/gpu/test_triton.py` runs it.

Triton decides when it is imported: `TRITON_INTERPRET=1 pytest` this file, with Triton installed.
"""

import importlib
import os
from importlib.util import find_spec

import pytest
import torch

from packlight.attention.flashinfer.bounds import gathered_products
from tests.support.page_bounds import ragged_bounds

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_dim", "group", "num_pages"), [(64, 1, 1), (96, 3, 33), (128, 4, 70), (40, 7, 5)])
def test_products_of_pages(dtype, head_dim, group, num_pages):
    """Pages that a head does not have are NaN, and neither read nor left undefined."""
    kernel = importlib.import_module("packlight.attention.flashinfer.products_kernel")
    given, is_stored = ragged_bounds(dtype, head_dim, group, num_pages)
    got, expected = kernel.page_products(*given), gathered_products(*given)
    torch.testing.assert_close(got[is_stored], expected[is_stored], atol=1e-4, rtol=1e-5)
    assert not got[~is_stored].any()
