"""Pages are stored bit for bit, whatever their size, dtype and strides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.kv.pool import store_pages

NUM_PAGES = 12


@settings(deadline=None)
@given(
    page_size=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    num_stored=st.integers(0, NUM_PAGES),
    offset=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_equals_an_assignment(page_size, head_dim, num_stored, offset, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, (100_000,), generator=generator, dtype=torch.uint8)
    memory = drawn[: NUM_PAGES * page_size * head_dim * dtype.itemsize].clone().view(dtype)
    memory = memory.view(NUM_PAGES, page_size, head_dim)
    pages = torch.randperm(NUM_PAGES, generator=generator)[:num_stored]
    flat = drawn.flip(0).view(dtype)[offset:][: num_stored * 2 * page_size * head_dim]
    given = flat.view(num_stored, 2, page_size, head_dim)[:, seed % 2]
    due = memory.clone().view(torch.uint8)
    due[pages] = given.contiguous().view(torch.uint8)
    store_pages(memory, pages, given)
    assert torch.equal(memory.view(torch.uint8), due)


@pytest.mark.parametrize("turn", [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[:, :, ::2]])
def test_rows_that_are_not_in_one_run(turn):
    given = turn(torch.randn(3, 4, 8))
    memory = torch.zeros(5, *given.shape[1:])
    store_pages(memory, torch.tensor([4, 0, 2]), given)
    assert torch.equal(memory[[4, 0, 2]], given)
    assert not memory[[1, 3]].any()
