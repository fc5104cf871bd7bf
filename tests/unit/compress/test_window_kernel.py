"""The Triton kernel in Triton's interpreter; on a GPU, `tests/gpu/test_triton.py` runs it.

Triton decides when it is imported, so it has to be asked for: `TRITON_INTERPRET=1 pytest` this file, with Triton
installed.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from packlight.compress.device_window import DeviceWindow
from packlight.compress.window import window_attention
from tests.support.packing import draw, naive_mass, view_of
from tests.unit.compress.test_paged_window import LAYER, stored

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no products of bf16
@pytest.mark.parametrize(
    ("num_tokens", "window", "num_kv_heads", "group", "head_dim", "page_size"),
    [
        (1, 1, 1, 1, 8, 4),
        (130, 32, 2, 4, 64, 16),
        (70, 5, 1, 7, 96, 16),
        (65, 33, 2, 1, 40, 1),
        (200, 16, 1, 8, 128, 16),
    ],
)
def test_the_mass_of_the_window(dtype, num_tokens, window, num_kv_heads, group, head_dim, page_size):
    """Several tiles, turns of rows, rows and dimensions that fill up; blocks in any order, and NaN around them."""
    view = view_of(*draw(num_tokens, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype), window)
    pool, blocks = stored(view.k_KSD, page_size)
    lse_WH = window_attention(view.q_WHD, view.k_KSD, view.scale).lse_WH
    for given_WH in (lse_WH, lse_WH.T.contiguous().T):
        found = DeviceWindow(pool).attend(LAYER, view.q_WHD, blocks, num_tokens, view.scale, given_WH)
        assert found.lse_WH is given_WH
        torch.testing.assert_close(found.mass_KS.double(), naive_mass(view), atol=3e-5, rtol=3e-5)


def test_without_a_log_sum_exp_torch_stands_in():
    """Triton is not asked for."""
    view = view_of(*draw(100), 8)
    pool, blocks = stored(view.k_KSD)
    found = DeviceWindow(pool).attend(LAYER, view.q_WHD, blocks, 100, view.scale)
    expected = window_attention(view.q_WHD, view.k_KSD, view.scale)
    assert torch.equal(found.mass_KS, expected.mass_KS)
    assert torch.equal(found.lse_WH, expected.lse_WH)
