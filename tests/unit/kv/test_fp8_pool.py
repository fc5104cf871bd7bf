"""Packed KV as plain FP8 numbers."""

import pytest
import torch

from packlight.core.errors import ConfigError
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool
from tests.support.paged_rows import model_spec

PAGE, DIM = 4, 8


def make_pool():
    return FP8Pool(model_spec(2, 2, DIM), num_blocks=5, page_size=PAGE, dtype=torch.float32)


def gathered(pool, pages):
    k, v = (torch.full((len(pages), PAGE, DIM), torch.nan) for _ in range(2))
    pool.gather(pages, k, v)
    return k, v


def test_what_is_written_is_read_within_the_format_s_error():
    pool, pages = make_pool(), torch.tensor([3, 0, 17])
    k, v = torch.randn(2, 3, PAGE, DIM, generator=torch.Generator().manual_seed(0)) * 3
    pool.write_pages(pages, k, v)
    pool.append(torch.tensor([3 * PAGE + 1]), torch.full((1, DIM), 2.0), torch.full((1, DIM), -0.5))
    k[0, 1], v[0, 1] = 2.0, -0.5
    for got, exact in zip(gathered(pool, pages), (k, v), strict=True):
        assert ((got - exact).abs() <= torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-10))).all()
        assert got[0, 1].tolist() == exact[0, 1].tolist()


def test_numbers_beyond_the_format_stay_finite():
    pool = make_pool()
    pool.append(torch.tensor([5]), torch.full((1, DIM), 1e6), torch.full((1, DIM), -1e6))
    k, v = gathered(pool, torch.tensor([1]))
    assert (k[0, 1, 0], v[0, 1, 0]) == (448.0, -448.0)


def test_it_takes_half_the_memory_of_16_bits():
    spec = model_spec(2, 2, DIM)
    plain = KVPool(spec, num_blocks=5, page_size=PAGE, dtype=torch.bfloat16)
    assert make_pool().memory_bytes * 2 == plain.memory_bytes
    fp8 = FP8Pool.of_size(spec, memory_bytes=plain.memory_bytes, page_size=PAGE, dtype=torch.bfloat16)
    assert fp8.num_head_pages == 2 * plain.num_head_pages
    with pytest.raises(ConfigError, match="one block of 4 tokens needs 256, got 255"):
        FP8Pool.of_size(spec, memory_bytes=255, page_size=PAGE, dtype=torch.bfloat16)
