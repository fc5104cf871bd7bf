"""Packing out of a pool against the plain `pack`, byte for byte, on every instruction set that this machine runs."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packlight.compress.base import Selection
from packlight.compress.pack import pack
from packlight.compress.packers import NativePacker, TorchPacker
from packlight.kv.pool import KVPool
from packlight.models.fake_spec import fake_spec
from packlight.native.compile import NativeUnavailable
from tests.support.native import VARIANTS, open_variant

LAYERS, LAYER = 3, 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=[*VARIANTS, None], ids=lambda variant: variant.name if variant else "torch")
def make_packer(request):
    if request.param is None:
        return TorchPacker
    try:
        library = open_variant(request.param)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    return lambda pool: NativePacker(pool, library)


def stored(num_tokens, num_kv_heads, head_dim, page_size, dtype):
    """(pool, blocks, K, V): the tokens in shuffled blocks of one layer, and NaN everywhere else."""
    generator = torch.Generator().manual_seed(num_tokens)
    k_KSD, v_KSD = torch.randn(2, num_kv_heads, num_tokens, head_dim, generator=generator).to(dtype)
    spec = replace(fake_spec(), num_layers=LAYERS, num_kv_heads=num_kv_heads, head_dim=head_dim)
    num_blocks = -(-num_tokens // page_size)
    pool = KVPool(spec, num_blocks=num_blocks + 2, page_size=page_size, dtype=dtype)
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    blocks = torch.randperm(num_blocks + 2, generator=generator)[:num_blocks]
    tokens = torch.arange(num_tokens)
    pool.k[blocks[tokens // page_size], LAYER, :, tokens % page_size] = k_KSD.transpose(0, 1)
    pool.v[blocks[tokens // page_size], LAYER, :, tokens % page_size] = v_KSD.transpose(0, 1)
    return pool, blocks, k_KSD, v_KSD


def as_bytes(pages):
    return pages.contiguous().view(torch.uint8)


def assert_packed(make_packer, shape, indices, page_size):
    pool, blocks, k_KSD, v_KSD = stored(*shape)
    selection = Selection(indices, 1.0)
    packed, due = make_packer(pool).pack(LAYER, blocks, selection), pack(k_KSD, v_KSD, selection, page_size)
    assert packed.lengths == due.lengths
    assert packed.pages.dtype == due.pages.dtype
    assert packed.pages.is_contiguous()
    assert torch.equal(as_bytes(packed.pages), as_bytes(due.pages))


@st.composite
def kept(draw, num_tokens, num_kv_heads):
    """What each head keeps: some runs and some single tokens, all, or nothing."""
    keeps = draw(st.lists(st.tuples(st.integers(0, num_tokens), st.integers(1, 40)), max_size=8))
    heads = []
    for _ in range(num_kv_heads):
        is_kept = torch.zeros(num_tokens, dtype=torch.bool)
        for start, length in draw(st.permutations(keeps))[: draw(st.integers(0, 8))]:
            is_kept[start : start + length] = True
        heads.append(is_kept if draw(st.booleans()) else ~is_kept)
    return tuple(head.nonzero()[:, 0] for head in heads)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    num_tokens=st.integers(1, 200),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 3, 8, 64]),
    page_size=st.sampled_from([1, 2, 7, 16]),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_the_plain_way(make_packer, data, num_tokens, num_kv_heads, head_dim, page_size, dtype):
    indices = data.draw(kept(num_tokens, num_kv_heads))
    assert_packed(make_packer, (num_tokens, num_kv_heads, head_dim, page_size, dtype), indices, page_size)


@pytest.mark.parametrize("num_tokens", [16, 160, 161, 4999])
def test_everything_is_kept(make_packer, num_tokens):
    shape = (num_tokens, 3, 64, 16, torch.bfloat16)
    assert_packed(make_packer, shape, (torch.arange(num_tokens),) * 3, 16)


def test_a_prompt_whose_every_head_is_dropped_has_no_pages(make_packer):
    nothing = torch.empty(0, dtype=torch.int64)
    assert_packed(make_packer, (20, 2, 8, 4, torch.float32), (nothing, nothing), 4)


def test_any_number_of_threads_packs_alike(make_packer):
    num_threads, chosen = torch.get_num_threads(), torch.arange(0, 300, 3)
    try:
        for each in (1, 2, 5):
            torch.set_num_threads(each)
            assert_packed(make_packer, (300, 3, 8, 16, torch.bfloat16), (chosen, chosen[:1], chosen[:50]), 16)
    finally:
        torch.set_num_threads(num_threads)


def test_pages_stay_what_they_are_while_anything_reads_them(make_packer):
    """The memory of a layer is used for later ones, but only when nobody has the layer any more."""
    pool, blocks, k_KSD, v_KSD = stored(64, 2, 8, 4, torch.bfloat16)
    packer, due = make_packer(pool), {}
    read = {}
    for first in range(0, 48, 4):
        selection = Selection((torch.arange(first, first + 9),) * 2, 1.0)
        packed = packer.pack(LAYER, blocks, selection)
        due[first] = as_bytes(pack(k_KSD, v_KSD, selection, 4).pages).flatten()
        if first % 8 == 0:
            read[first] = memoryview(as_bytes(packed.pages).flatten().numpy())
        del packed
    gc.collect()
    for first, data in read.items():
        assert torch.equal(torch.frombuffer(data, dtype=torch.uint8), due[first])
