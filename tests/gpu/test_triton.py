"""The Triton kernels against their twins in torch."""

import pytest
import torch

from packlight.attention.flashinfer.bounds import compiled_products, gathered_products
from packlight.attention.flashinfer.ops import has_triton, page_ops
from packlight.compress.device_window import DeviceWindow, has_kernel
from packlight.compress.window import window_attention
from packlight.kv.pool import KVPool
from packlight.models.fused.ops import layer_ops
from tests.support import layer_ops_checks, page_ops_checks
from tests.support.packing import draw, view_of
from tests.support.page_bounds import ragged_bounds
from tests.support.paged_rows import model_spec

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Beside the small ones: pages of 32k tokens, and of 128k.
PAGE_SHAPES = [*page_ops_checks.SHAPES, (128, 4, 2048, 16, 128), (256, 8, 8192, 16, 512)]
needs_triton = pytest.mark.skipif(not has_triton(torch.device("cuda")), reason="Triton is not installed")


# ── a decode step's pages ────────────────────────────────────────────────────────────────────────────────────────────


@needs_triton
@pytest.mark.parametrize("shape", PAGE_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.bfloat16, page_ops_checks.BOUNDS),
        (torch.bfloat16, page_ops_checks.MASS),
        (torch.bfloat16, page_ops_checks.MASS_OF_FEW_DIMS),
        (torch.float16, page_ops_checks.MASS),
        (torch.float32, page_ops_checks.BOUNDS),
    ],
)
def test_ratings_of_pages(dtype, shape, rule):
    page_ops_checks.check_ratings(page_ops(torch.device("cuda")), "cuda", dtype, shape, rule)


@needs_triton
@pytest.mark.parametrize("shape", PAGE_SHAPES, ids=str)
def test_pages_picked(shape):
    ops = page_ops(torch.device("cuda"))
    for seed in range(4):
        page_ops_checks.check_picked(ops, "cuda", shape, few=seed % 2 == 0, seed=seed)
    page_ops_checks.check_picked_by_mass(ops, "cuda", shape)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (40, 1), (128, 4), (256, 16)])
def test_new_tokens(dtype, fp8, head_dim, page_size):
    ops = page_ops(torch.device("cuda"))
    page_ops_checks.check_stored(ops, "cuda", dtype, head_dim, page_size, fp8=fp8)


# ── between the products of a layer ──────────────────────────────────────────────────────────────────────────────────


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layers_operations(dtype):
    ops = layer_ops("cuda")
    for num_tokens, size in (*layer_ops_checks.SIZES, (3, 14_336)):
        for has_delta in (True, False):
            layer_ops_checks.check_add_norm(ops, "cuda", dtype, num_tokens, size, has_delta=has_delta)
        layer_ops_checks.check_gate(ops, "cuda", dtype, num_tokens, size)
    for heads in layer_ops_checks.HEADS:
        for has_norm in (True, False):
            layer_ops_checks.check_turn(ops, "cuda", dtype, heads, has_norm=has_norm)
    layer_ops_checks.check_no_tokens(ops, "cuda")


# ── products, and the window ─────────────────────────────────────────────────────────────────────────────────────────


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (96, 3), (128, 4), (128, 7), (256, 8)])
@pytest.mark.parametrize("num_pages", [1, 31, 32, 700])
def test_products_of_pages(dtype, head_dim, group, num_pages):
    """Pages that a head does not have are NaN, and neither read nor left undefined."""
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
