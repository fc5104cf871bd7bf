import pytest
import torch

from packlight.compress.base import Selection
from packlight.compress.pack import pack
from packlight.compress.recipes import CODECS
from packlight.core.errors import ShipmentCorrupt

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_pages(dtype, num_pages=5):
    return torch.randn(num_pages, 4, 6).to(dtype), torch.randn(num_pages, 4, 6).to(dtype)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_pages", [0, 1, 5])
def test_round_trip(name, dtype, num_pages):
    codec, pages = CODECS.load(name)(), random_pages(dtype, num_pages)
    payload = codec.encode(*pages)
    assert payload.dtype == torch.uint8
    assert payload.is_contiguous()
    assert payload.shape == (codec.payload_bytes(num_pages, 4, 6, dtype),)
    for before, after in zip(pages, codec.decode(payload, num_pages, 4, 6, dtype), strict=True):
        assert after.dtype == dtype
        assert after.shape == before.shape
        exact = name == "native" or dtype == torch.bfloat16
        torch.testing.assert_close(after, before, rtol=0 if exact else 2**-8, atol=0)


@pytest.mark.parametrize("name", CODECS)
def test_k_pages_come_first(name):
    payload = CODECS.load(name)().encode(torch.zeros(2, 4, 6), torch.ones(2, 4, 6))
    half = payload.numel() // 2
    assert not payload[:half].any()
    assert payload[half:].any()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_refused(name, change):
    codec = CODECS.load(name)()
    num_bytes = codec.payload_bytes(5, 4, 6, torch.float32)
    with pytest.raises(ShipmentCorrupt, match=f"{num_bytes + change} bytes, expected {num_bytes}"):
        codec.decode(torch.zeros(num_bytes + change, dtype=torch.uint8), 5, 4, 6, torch.float32)


def test_native_neither_copies_on_the_way_out_nor_in():
    k_KSD, codec = torch.randn(2, 9, 6), CODECS.load("native")()
    packed = pack(k_KSD, k_KSD, Selection((torch.tensor([0, 8]), torch.tensor([1, 2, 5, 6, 7])), 1.0), 4)
    payload = codec.encode(packed.k_pages, packed.v_pages)
    assert payload.data_ptr() == packed.k_pages.data_ptr()
    k_pages, v_pages = codec.decode(payload, packed.num_pages, 4, 6, torch.float32)
    assert k_pages.data_ptr() == payload.data_ptr()
    assert torch.equal(k_pages, packed.k_pages)
    assert torch.equal(v_pages, packed.v_pages)


def test_native_is_not_fooled_by_neighbours_in_one_storage():
    codec, whole = CODECS.load("native")(), torch.randn(5, 4, 6)
    for k_pages, v_pages in ((whole[3:], whole[:2]), (whole[:2], whole[3:]), (whole[:2], whole[2:4, :, :].flip(0))):
        decoded = codec.decode(codec.encode(k_pages, v_pages), 2, 4, 6, torch.float32)
        assert torch.equal(decoded[0], k_pages)
        assert torch.equal(decoded[1], v_pages)


@pytest.mark.parametrize("name", CODECS)
def test_payload_at_an_odd_address(name):
    codec, pages = CODECS.load(name)(), random_pages(torch.float32)
    payload = codec.encode(*pages)
    shifted = torch.empty(payload.numel() + 1, dtype=torch.uint8)
    shifted[1:] = payload
    straight, odd = (codec.decode(source, 5, 4, 6, torch.float32) for source in (payload, shifted[1:]))
    assert torch.equal(odd[0], straight[0])
    assert torch.equal(odd[1], straight[1])
