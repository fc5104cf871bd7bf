"""Every attention backend does what the reference does: random ragged batches over poisoned pools.

The reference itself is held against a materialised softmax over plain contiguous tensors (`oracle`).
"""

import numpy as np
import pytest
import torch

from packlight.attention.base import DecodeBatch, PrefillBatch, PrefillChunk
from packlight.attention.registry import BACKENDS
from packlight.core.types import ModelSpec
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.table import HeadPageTable

LAYERS, PAGE, DIM, SCALE = 2, 4, 8, 0.3
NON_CUDA = [name for name in BACKENDS if name != "flashinfer"]


def spec(num_kv_heads):
    return ModelSpec("m", "f", LAYERS, num_kv_heads, DIM, 10, 100, (), "float32", (None,) * LAYERS)


def make_pool(num_kv_heads, dtype=torch.float32, num_blocks=64):
    pool = KVPool(spec(num_kv_heads), num_blocks=num_blocks, page_size=PAGE, dtype=dtype)
    pool.k.fill_(1e4)  # what is not stored must not matter; finite, because a page's tail is multiplied by zero
    pool.v.fill_(1e4)
    return pool


def oracle(q_THD, k_SKD, v_SKD, first_row, window):
    """softmax(q k^T) v with row i at position first_row + i, the slow way."""
    group = q_THD.shape[1] // k_SKD.shape[1]
    out = torch.zeros_like(q_THD)
    for row in range(q_THD.shape[0]):
        position = first_row + row
        start = max(0, position - window + 1) if window else 0
        for head in range(q_THD.shape[1]):
            k, v = k_SKD[start : position + 1, head // group], v_SKD[start : position + 1, head // group]
            out[row, head] = torch.softmax(k.float() @ q_THD[row, head].float() * SCALE, 0) @ v.float()
    return out


@pytest.fixture(params=NON_CUDA)
def backend(request):
    return BACKENDS.load(request.param)()


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_prefill_in_ragged_chunks_is_one_causal_attention(backend, window, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    pool, book = make_pool(num_kv_heads), PageBook(64)
    lengths, cuts = [13, 1, 22], [[5, 13], [1], [4, 8, 22]]
    q, k, v = (
        [torch.randn(LAYERS, n, heads, DIM, generator=generator) for n in lengths]
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    blocks = [torch.from_numpy(book.allocate(-(-n // PAGE))).long() for n in lengths]
    got = [torch.zeros(LAYERS, n, num_heads, DIM) for n in lengths]
    done = [0] * len(lengths)
    for step in range(3):
        parts = [(i, done[i], cuts[i][step]) for i in range(len(lengths)) if step < len(cuts[i])]
        seen_layers = []
        chunks, start = [], 0
        for i, begin, end in parts:
            chunks.append(PrefillChunk(start, end - begin, begin, blocks[i][: -(-end // PAGE)]))
            start += end - begin
            done[i] = end
        hook = lambda layer, q_THD, scale, seen=seen_layers: seen.append((layer, len(q_THD), scale))  # noqa: E731
        plan = backend.plan(PrefillBatch(pool, tuple(chunks), hook))
        for layer in range(LAYERS):
            flat = [torch.cat([x[i][layer, begin:end] for i, begin, end in parts]) for x in (q, k, v)]
            out = plan.attend(layer, *flat, scale=SCALE, sliding_window=window)
            for chunk, (i, begin, end) in zip(chunks, parts, strict=True):
                got[i][layer, begin:end] = out[chunk.start : chunk.start + chunk.num_tokens]
        assert seen_layers == [(layer, start, SCALE) for layer in range(LAYERS)]
    for i in range(len(lengths)):
        for layer in range(LAYERS):
            expected = oracle(q[i][layer], k[i][layer], v[i][layer], 0, window)
            torch.testing.assert_close(got[i][layer], expected, atol=1e-5, rtol=1e-5)
            stored_k, stored_v = pool.read_blocks(layer, blocks[i], lengths[i])
            assert torch.equal(stored_k, k[i][layer].transpose(0, 1))
            assert torch.equal(stored_v, v[i][layer].transpose(0, 1))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_over_ragged_head_pages(backend, window, num_heads, num_kv_heads, dtype):
    """Each (request, layer, head) has its own stored tokens; several steps append to them."""
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    pool = make_pool(num_kv_heads, dtype)
    table = HeadPageTable(
        PageBook(pool.num_head_pages), num_rows=4, num_layers=LAYERS, num_kv_heads=num_kv_heads, page_size=PAGE
    )
    rows = [table.open() for _ in range(3)]
    stored = {}
    for row in rows:
        for layer in range(LAYERS):
            lengths = rng.integers(1, 15, num_kv_heads).tolist()
            pages = iter(table.fill_layer(row, layer, lengths).tolist())
            for head, length in enumerate(lengths):
                k, v = (torch.randn(length, DIM, generator=generator).to(dtype) for _ in range(2))
                stored[row, layer, head] = (k, v)
                for start in range(0, length, PAGE):
                    page = next(pages)
                    pool.k_pages[page, : min(PAGE, length - start)] = k[start : start + PAGE]
                    pool.v_pages[page, : min(PAGE, length - start)] = v[start : start + PAGE]
    for _ in range(6):
        batch_rows = rows[::-1]
        table.grow(batch_rows)
        plan = backend.plan(DecodeBatch(pool, table, tuple(batch_rows)))
        for layer in range(LAYERS):
            q = torch.randn(3, num_heads, DIM, generator=generator).to(dtype)
            k, v = (torch.randn(3, num_kv_heads, DIM, generator=generator).to(dtype) for _ in range(2))
            out = plan.attend(layer, q, k, v, scale=SCALE, sliding_window=window)
            assert out.dtype == dtype
            for index, row in enumerate(batch_rows):
                for head in range(num_kv_heads):
                    old_k, old_v = stored[row, layer, head]
                    stored[row, layer, head] = (
                        torch.cat([old_k, k[index, head][None]]),
                        torch.cat([old_v, v[index, head][None]]),
                    )
                    group = num_heads // num_kv_heads
                    heads = slice(head * group, (head + 1) * group)
                    k_SKD, v_SKD = (x[:, None] for x in stored[row, layer, head])
                    expected = oracle(q[index : index + 1, heads], k_SKD, v_SKD, len(k_SKD) - 1, window)
                    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
                    torch.testing.assert_close(
                        out[index, heads].float(), expected[0].float(), atol=tolerance, rtol=tolerance
                    )
        table.advance(batch_rows)
