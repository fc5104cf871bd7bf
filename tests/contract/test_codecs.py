"""What every codec of the registry owes: a new row joins by itself, once it states its error in `RELATIVE_ERROR`."""

import pytest
import torch

from packlight.compress.codecs.turboquant import TurboQuantCodec
from packlight.compress.parts import CODECS
from packlight.core.errors import InvalidRequest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 8), (16, 64), (3, 16)]
LOSSY = [name for name in CODECS if not CODECS.load(name).is_exact]

# Root mean square error relative to the values', of K and of V on Gaussian pages: at most.
RELATIVE_ERROR = {
    "native": (0, 0),
    "bf16": (0.003, 0.003),
    "fp8": (0.03, 0.03),
    "int8": (0.006, 0.007),
    "int4": (0.07, 0.09),
    "int2": (0.34, 0.41),
    "turboquant4": (0.1, 0.19),
    "turboquant3": (0.19, 0.35),
    "turboquant2": (0.35, 0.35),
}


def gaussian(num_pages, page_size, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_PTD, v_PTD = torch.randn(2, num_pages, page_size, head_dim, generator=generator).to(dtype)
    return k_PTD, v_PTD


def decoded(codec, k_PTD, v_PTD, counts=None, dtype=None):
    counts = [len(k_PTD)] if counts is None else counts
    _, page_size, head_dim = k_PTD.shape
    return codec.decode(codec.encode(k_PTD, v_PTD, counts), page_size, head_dim, dtype or k_PTD.dtype)


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.fixture(params=CODECS)
def codec(request):
    return CODECS.load(request.param)()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0], [1], [2, 0, 3], []])
def test_records_have_their_size_and_pages_their_shape(codec, dtype, counts, shape):
    pages = gaussian(sum(counts), *shape, dtype)
    records = codec.encode(*pages, counts)
    assert records.dtype == torch.uint8
    assert records.shape == (sum(counts), codec.record_bytes(*shape, dtype))
    for before, after in zip(pages, codec.decode(records, *shape, dtype), strict=True):
        assert after.dtype == dtype
        assert after.shape == before.shape


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error(name, dtype):
    pages, codec = gaussian(32, 16, 64, dtype), CODECS.load(name)()
    rounding = 0 if codec.is_exact else torch.finfo(dtype).eps
    for before, after, limit in zip(pages, decoded(codec, *pages), RELATIVE_ERROR[name], strict=True):
        assert rms(after.double() - before.double()) <= (limit + rounding) * rms(before)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in LOSSY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_codecs_are_exact(name, dtype):
    pages = gaussian(5, 4, 8, dtype)
    assert all(torch.equal(*pair) for pair in zip(pages, decoded(CODECS.load(name)(), *pages), strict=True))


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_are_smaller(name):
    codec, native = CODECS.load(name)(), CODECS.load("native")()
    assert codec.record_bytes(16, 64, torch.float32) <= native.record_bytes(16, 64, torch.float32) / 2


def test_two_codecs_of_a_kind_agree(codec):
    pages, other = gaussian(5, 16, 64), type(codec)()
    records = codec.encode(*pages, [5])
    assert torch.equal(records, other.encode(*pages, [5]))
    first, second = (reader.decode(records, 16, 64, torch.float32) for reader in (codec, other))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("subset", [[3], [0, 4], [4, 3, 2, 1, 0], []])
def test_a_record_is_read_alone(codec, subset):
    records = codec.encode(*gaussian(5, 16, 64), [2, 3])
    every = codec.decode(records, 16, 64, torch.float32)
    some = codec.decode(records[subset], 16, 64, torch.float32)
    for all_pages, few_pages in zip(every, some, strict=True):
        torch.testing.assert_close(few_pages, all_pages[subset], rtol=1e-5, atol=1e-5)


def test_pages_are_coded_one_by_one(codec):
    """In another order within each head, and heads in another order."""
    k_PTD, v_PTD = gaussian(6, 16, 64)
    k_PTD[2:] *= 30  # another head, another range
    order = [4, 2, 5, 3, 1, 0]
    straight = codec.encode(k_PTD, v_PTD, [2, 0, 4])
    assert torch.equal(codec.encode(k_PTD[order], v_PTD[order], [4, 2]), straight[order])


def test_strided_pages(codec):
    pages_P2TD = torch.stack(gaussian(5, 16, 64), dim=1)
    halves = pages_P2TD[:, 0], pages_P2TD[:, 1]
    assert torch.equal(codec.encode(*halves, [5]), codec.encode(*(x.contiguous() for x in halves), [5]))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_records_at_odd_addresses_and_strides(codec, offset):
    records = codec.encode(*gaussian(5, 16, 64), [5])
    wider = torch.zeros(5, records.shape[1] + offset + 1, dtype=torch.uint8)
    moved = wider[:, offset:-1]
    moved.copy_(records)
    straight, odd = (codec.decode(source, 16, 64, torch.float32) for source in (records, moved))
    assert all(torch.equal(*pair) for pair in zip(straight, odd, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(codec, dtype):
    zeros = torch.zeros(3, 4, 8, dtype=dtype)
    assert not any(pages.any() for pages in decoded(codec, zeros, zeros, [1, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-6, 2.5e4])
def test_constant_pages_keep_their_value_nearly(codec, dtype, value):
    """Not a single one becomes NaN, though their groups have no width."""
    constant = torch.full((3, 4, 8), value, dtype=dtype)
    for pages in decoded(codec, constant, constant):
        torch.testing.assert_close(pages, constant, rtol=0.75, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_stay_finite_and_keep_their_sign(codec, dtype):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(3, 4, 8, generator=generator).sign()
    largest = torch.finfo(dtype).max
    huge = (signs * 1e38 if largest > 1e38 else signs * largest).to(dtype)
    huge[0, 0] = 0.0
    for pages in decoded(codec, huge, huge):
        assert pages.isfinite().all()
        where = huge.abs() > 0
        assert (pages.sign() == huge.sign())[where].float().mean() > 0.7


@pytest.mark.parametrize("head_dim", [6, 80, 96])
def test_any_head_dim_is_coded_or_refused_by_number(codec, head_dim):
    """Real models have heads of 80 and 96 channels."""
    k_PTD, v_PTD = gaussian(4, 5, head_dim)
    if isinstance(codec, TurboQuantCodec):
        with pytest.raises(InvalidRequest, match=f"head_dim is {head_dim}") as refusal:
            codec.record_bytes(5, head_dim, torch.float32)
        assert refusal.value.param == "kv.codec"
        return
    for before, after in zip((k_PTD, v_PTD), decoded(codec, k_PTD, v_PTD), strict=True):
        assert rms(after - before) < 0.5 * rms(before)
