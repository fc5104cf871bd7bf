"""Page summaries: exact minima and maxima, however the keys came."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.kv.summaries import PageSummaries
from tests.support.paged_rows import bounds_of

PAGE, DIM = 4, 3


@given(st.lists(st.integers(1, 11), min_size=1, max_size=4), st.integers(0, 12), st.integers(0, 2**31))
def test_built_then_appended_equals_recomputed(lengths, num_appended, seed):
    """One sequence per entry, on pages scattered over the pool; unused slots and earlier owners hold rubbish."""
    generator = torch.Generator().manual_seed(seed)
    summaries = PageSummaries(64, DIM, torch.float32)
    summaries.build(torch.arange(64), torch.randn(64, PAGE, DIM, generator=generator) * 100, torch.full((64,), PAGE))
    places = torch.randperm(64, generator=generator).view(-1, 8)[: len(lengths)]
    keys = [torch.randn(length, DIM, generator=generator) for length in lengths]
    for pages, key in zip(places, keys, strict=True):
        num_pages = -(-len(key) // PAGE)
        k_XPD = torch.full((num_pages * PAGE, DIM), torch.nan)
        k_XPD[: len(key)] = key
        counts = torch.tensor([min(PAGE, len(key) - start) for start in range(0, len(key), PAGE)])
        summaries.build(pages[:num_pages], k_XPD.view(-1, PAGE, DIM), counts)
    for _ in range(num_appended):
        new = torch.randn(len(lengths), DIM, generator=generator)
        indices = torch.tensor([len(key) for key in keys])
        now = torch.stack([pages[index // PAGE] for pages, index in zip(places, indices, strict=True)])
        summaries.begin(now[indices % PAGE == 0])
        summaries.add(now, new)
        keys = [torch.cat([key, row[None]]) for key, row in zip(keys, new, strict=True)]
    for pages, key in zip(places, keys, strict=True):
        expected = bounds_of(key, PAGE)
        assert torch.equal(summaries.read(pages[: len(expected)]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bounds_are_stored_without_rounding(dtype):
    k_XPD = torch.randn(5, PAGE, DIM).to(dtype)
    summaries = PageSummaries(5, DIM, dtype)
    summaries.build(torch.arange(5), k_XPD, torch.full((5,), PAGE))
    assert torch.equal(summaries.read(torch.arange(5)), torch.cat([k_XPD.amin(1), k_XPD.amax(1)], dim=1))


def test_an_overwritten_token_only_widens_its_page():
    summaries = PageSummaries(1, 1, torch.float32)
    summaries.build(torch.tensor([0]), torch.tensor([[[1.0], [5.0]]]), torch.tensor([2]))
    summaries.add(torch.tensor([0]), torch.tensor([[3.0]]))
    assert summaries.read(torch.tensor([0])).tolist() == [[1.0, 5.0]]
    summaries.add(torch.tensor([0]), torch.tensor([[-2.0]]))
    assert summaries.read(torch.tensor([0])).tolist() == [[-2.0, 5.0]]


def test_reading_into_memory_that_is_there():
    summaries = PageSummaries(3, 2, torch.float32)
    summaries.build(torch.arange(3), torch.arange(12.0).view(3, 2, 2), torch.tensor([2, 1, 2]))
    out = torch.empty(4, 4)
    assert summaries.read(torch.tensor([2, 1, 1, 0]), out) is out
    assert out.tolist() == [[8, 9, 10, 11], [4, 5, 4, 5], [4, 5, 4, 5], [0, 1, 2, 3]]
