import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import Selection
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.layout import total_pages
from packlight.compress.pack import pack
from packlight.compress.parts import CODECS
from packlight.compress.payload import (
    decode_layer,
    encode_layer,
    max_payload_bytes,
    payload_bytes,
    split_payload,
    tokens_per_page,
)
from packlight.core.errors import ShipmentCorrupt

PAGE, DIM = 4, 8
FP32 = torch.float32

codecs = st.sampled_from(list(CODECS)).map(lambda name: CODECS.load(name)())
all_lengths = st.lists(st.integers(0, 3 * PAGE + 1), min_size=1, max_size=4)


def packed_of(lengths, dtype=FP32):
    generator = torch.Generator().manual_seed(sum(lengths))
    k_KSD, v_KSD = torch.randn(2, len(lengths), max(lengths) + 1, DIM, generator=generator).to(dtype)
    selection = Selection(tuple(torch.arange(length) for length in lengths), 1.0)
    return pack(k_KSD, v_KSD, selection, PAGE)


def open_pages(lengths):
    """Which of the layer's pages are partly filled."""
    return tokens_per_page(lengths, PAGE) < PAGE


def test_tokens_per_page():
    assert tokens_per_page([9, 0, 4, 3], 4).tolist() == [4, 4, 1, 4, 3]
    assert tokens_per_page([0, 0], 4).tolist() == []


@settings(deadline=None)
@given(codecs, all_lengths, st.sampled_from([FP32, torch.bfloat16]))
def test_whole_pages_are_coded_and_partly_filled_ones_exact(codec, lengths, dtype):
    packed = packed_of(lengths, dtype)
    payload = encode_layer(codec, packed)
    assert payload.dtype == torch.uint8
    assert payload.shape == (payload_bytes(codec, lengths, PAGE, DIM, dtype),)
    decoded = decode_layer(codec, payload, lengths, PAGE, DIM, dtype)
    is_open, whole = open_pages(lengths), [length // PAGE for length in lengths]
    coded = (packed.k_pages[~is_open], packed.v_pages[~is_open])
    expected = codec.decode(codec.encode(*coded, whole), PAGE, DIM, dtype)
    for after, before, whole_pages in zip(decoded, (packed.k_pages, packed.v_pages), expected, strict=True):
        assert after.shape == before.shape
        assert after.dtype == dtype
        assert torch.equal(after[is_open], before[is_open])
        assert torch.equal(after[~is_open], whole_pages)


@given(codecs, all_lengths, st.sampled_from([1, 3, PAGE, 16]))
def test_the_upper_bound_holds(codec, lengths, page_size):
    for num_tokens in (max(lengths), max(lengths) + 1):
        bound = max_payload_bytes(codec, num_tokens, len(lengths), page_size, DIM, FP32)
        assert payload_bytes(codec, lengths, page_size, DIM, FP32) <= bound


@pytest.mark.parametrize("name", CODECS)
def test_the_upper_bound_is_not_far_off(name):
    codec = CODECS.load(name)()
    native = NativeCodec().record_bytes(16, 64, FP32)
    bound = max_payload_bytes(codec, 1600, 3, 16, 64, FP32)
    assert bound <= payload_bytes(codec, [1600] * 3, 16, 64, FP32) + 3 * native


def test_exact_payload_is_the_packed_memory():
    packed, codec = packed_of([5, 0, 4]), NativeCodec()
    payload = encode_layer(codec, packed)
    assert payload.data_ptr() == packed.pages.data_ptr()
    k_PTD, v_PTD = decode_layer(codec, payload, [5, 0, 4], PAGE, DIM, FP32)
    assert k_PTD.data_ptr() == payload.data_ptr()
    assert v_PTD.data_ptr() == payload.data_ptr() + PAGE * DIM * FP32.itemsize


@given(codecs, all_lengths)
def test_split_shows_the_same_bytes_without_copying_them(codec, lengths):
    packed = packed_of(lengths)
    payload = encode_layer(codec, packed)
    split = split_payload(codec, payload, lengths, PAGE, DIM, FP32)
    assert torch.equal(torch.cat([split.records.flatten(), split.open_records.flatten()]), payload)
    assert sorted([*split.pages.tolist(), *split.open_pages.tolist()]) == list(range(total_pages(lengths, PAGE)))
    assert len(split.pages) == len(split.records)
    assert split.open_pages.tolist() == ([] if codec.is_exact else open_pages(lengths).nonzero()[:, 0].tolist())
    if len(split.records):
        assert split.records.data_ptr() == payload.data_ptr()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_refused(name, change):
    codec = CODECS.load(name)()
    num_bytes = payload_bytes(codec, [5, 8], PAGE, DIM, FP32)
    payload = torch.zeros(num_bytes + change, dtype=torch.uint8)
    with pytest.raises(ShipmentCorrupt, match=f"{num_bytes + change} bytes, expected {num_bytes}"):
        decode_layer(codec, payload, [5, 8], PAGE, DIM, FP32)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("offset", [1, 2])
def test_payload_at_an_odd_address(name, offset):
    codec, lengths = CODECS.load(name)(), [5, 8, 9]
    payload = encode_layer(codec, packed_of(lengths))
    shifted = torch.cat([torch.zeros(offset, dtype=torch.uint8), payload])[offset:]
    pairs = zip(*(decode_layer(codec, source, lengths, PAGE, DIM, FP32) for source in (payload, shifted)), strict=True)
    assert all(torch.equal(straight, odd) for straight, odd in pairs)
