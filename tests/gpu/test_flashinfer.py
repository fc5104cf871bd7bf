"""FlashInfer's kernels against attention written out on the CPU: random ragged shapes over poisoned pools.

Each head dim, dtype and whether there is a window is a kernel of its own that takes minutes to compile. So everything
is tested with bf16 heads of 128, which the figures need too, and with heads of 64 what compiles fast.
"""

import numpy as np
import pytest
import torch

from packlight.attention.base import DecodeBatch, PrefillBatch, PrefillChunk
from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.wrappers import FlashInferKernels
from packlight.attention.reference import ReferenceAttention
from packlight.compress.codecs.fp8 import FP8Codec
from packlight.compress.codecs.kivi import Int4Codec
from packlight.compress.readers.freekv import FreeKVReader
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.reading import Reading
from tests.support.paged_rows import SCALE, PagedRows, bounds_of, chosen_pages, model_spec

pytestmark = pytest.mark.gpu
PAGE = 16
TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
GROUPS = [(4, 4), (8, 4), (3, 1), (16, 4), (10, 2), (12, 2), (14, 2), (16, 2), (16, 1)]
READERS = {
    "quest": QuestReader,
    "hsa": lambda: HSAReader(num_dims=64),
    "freekv": lambda: FreeKVReader(cosine=0.8, num_rows=8),
}


def rows_of(num_heads=8, num_kv_heads=2, *, low=1, high=200, num_rows=3, head_dim=128, dtype=torch.bfloat16, **how):
    lengths = np.random.default_rng(num_heads).integers(low, high, (num_rows, 2, num_kv_heads)).tolist()
    how = {"head_dim": head_dim, "page_size": PAGE, "num_blocks": 60, "dtype": dtype, "device": "cuda"} | how
    return PagedRows(lengths, num_heads=num_heads, **how)


def check(paged, rows, out, q, *, chosen=lambda row, layer: None, windows=(None, None)):
    for layer, window in enumerate(windows):
        for place, row in enumerate(rows):
            expected = paged.expected(row, layer, q[layer, place], chosen(row, layer), window)
            torch.testing.assert_close(out[layer, place].float().cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [*((*heads, 128) for heads in GROUPS), (8, 4, 64), (3, 1, 64)]
)
def test_decode(flashinfer, num_heads, num_kv_heads, head_dim):
    paged = rows_of(num_heads, num_kv_heads, head_dim=head_dim)
    rows = paged.rows[::-1]
    for windows in [(None, None), (None, 37), (16, 150)] if head_dim == 128 else [(None, None)]:
        tokens = paged.new_tokens(rows)
        out = paged.step(flashinfer, rows, tokens=tokens, windows=windows)
        check(paged, rows, out, tokens[0], windows=windows)


@pytest.mark.parametrize("num_heads", [8, 16])
def test_decode_on_the_cuda_cores_where_it_is_asked_for(num_heads):
    kernels = FlashInferKernels.on(torch.device("cuda"), cuda_core_groups=(num_heads // 2,))
    paged = rows_of(num_heads, 2)
    tokens = paged.new_tokens(paged.rows)
    check(paged, paged.rows, paged.step(FlashInferAttention("cuda", kernels), paged.rows, tokens=tokens), tokens[0])


def test_pages_of_others_are_not_read(flashinfer):
    paged = rows_of()
    paged.table.grow(paged.rows)
    held = np.concatenate([paged.table.held(row) for row in paged.rows[:2]])
    others = torch.from_numpy(np.setdiff1d(np.arange(paged.pool.num_head_pages), held)).cuda()
    paged.pool.k_pages[others] = paged.pool.v_pages[others] = torch.nan
    tokens = paged.new_tokens(paged.rows[:2])
    check(paged, paged.rows[:2], paged.step(flashinfer, paged.rows[:2], tokens=tokens), tokens[0])


@pytest.mark.parametrize("make_reader", READERS.values(), ids=READERS)
def test_sparse_decode_reads_the_pages_that_score_best(flashinfer, make_reader):
    """Over steps that fill pages and begin new ones; a dense row stands beside the sparse ones."""
    paged, reader, scores = rows_of(low=150, high=700, num_blocks=120), make_reader(), {}

    class Recorded:
        forget = reader.forget

        def score(self, query):
            found = reader.score(query)
            scores.update({(row, query.layer): found[place].tolist() for place, row in enumerate(query.rows)})
            return found

    budgets = dict(zip(paged.rows, (4, 7, None), strict=True))
    recorded = Recorded()
    reads = [None if budget is None else Reading(recorded, budget) for budget in budgets.values()]

    def chosen(row, layer):
        num_pages = [paged.num_pages(row, layer, head) for head in range(2)]
        if budgets[row] is None or max(num_pages) <= budgets[row]:
            return None
        return [chosen_pages(scores[row, layer][head], num_pages[head], budgets[row]) for head in range(2)]

    for _ in range(20):
        tokens = paged.new_tokens(paged.rows)
        out = paged.step(flashinfer, paged.rows, reads, tokens)
        check(paged, paged.rows, out, tokens[0], chosen=chosen)
    for row in paged.rows[:2]:
        for layer in range(2):
            ids = torch.tensor(paged.page_ids(row, layer, 0), device="cuda")
            expected = bounds_of(paged.stored[row, layer, 0][0], PAGE)
            assert torch.equal(paged.summaries.read(ids).cpu(), expected)


@pytest.mark.parametrize(
    ("codec", "num_heads"), [(FP8Codec, 8), (Int4Codec, 8), (lambda: "fp8 pool", 8), (lambda: "fp8 pool", 4)]
)
def test_pages_in_fewer_bits_are_read_as_on_the_cpu(flashinfer, codec, num_heads):
    ours, theirs = rows_of(num_heads, codec=codec()), rows_of(num_heads, codec=codec(), device="cpu")
    for _ in range(3):
        tokens = ours.new_tokens(ours.rows)
        out = ours.step(flashinfer, ours.rows, tokens=tokens)
        expected = theirs.step(ReferenceAttention(), theirs.rows, tokens=[x.cpu() for x in tokens])
        torch.testing.assert_close(out.cpu(), expected, **TOLERANCE)


def test_a_decode_step_does_not_wait_for_the_device(flashinfer, no_waiting):
    """Once kernels are compiled, and whether pages are begun or not: sparse and dense layers alike."""
    paged, reader = rows_of(low=60, high=90), QuestReader()
    tokens = paged.new_tokens(paged.rows)
    for number in range(20):
        q, k, v = tokens
        paged.table.grow(paged.rows)
        reads = (Reading(reader, 3, num_dense_layers=1),) * len(paged.rows)
        if number == 2:
            torch.cuda.synchronize()
            no_waiting()
        plan = flashinfer.plan(DecodeBatch(paged.pool, paged.table, tuple(paged.rows), reads, paged.summaries))
        for layer in range(2):
            plan.attend(layer, q[layer], k[layer], v[layer], scale=SCALE, sliding_window=None)
        paged.table.advance(paged.rows)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (3, 3), (14, 2)])
def test_prefill_in_ragged_chunks_is_one_causal_attention(flashinfer, num_heads, num_kv_heads, window):
    generator, head_dim = torch.Generator().manual_seed(0), 128
    spec = model_spec(2, num_kv_heads, head_dim)
    pool = KVPool(spec, num_blocks=60, page_size=PAGE, dtype=torch.bfloat16, device="cuda")
    pool.k.fill_(1e4)
    pool.v.fill_(1e4)
    book, lengths, cuts = PageBook(60), [130, 1, 300], [[50, 130], [1], [4, 80, 300]]
    q, k, v = (
        [torch.randn(2, n, heads, head_dim, generator=generator).bfloat16() for n in lengths]
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    blocks = [torch.from_numpy(book.allocate(-(-n // PAGE))).long().cuda() for n in lengths]
    done = [0] * len(lengths)
    for step in range(3):
        chunks, start, parts = [], 0, [(i, done[i], cuts[i][step]) for i in range(3) if step < len(cuts[i])]
        for i, begin, end in parts:
            chunks.append(PrefillChunk(start, end - begin, begin, blocks[i][: -(-end // PAGE)]))
            start, done[i] = start + end - begin, end
        seen = []
        hook = lambda layer, queries, seen=seen: seen.append(queries)  # noqa: E731
        plan = flashinfer.plan(PrefillBatch(pool, tuple(chunks), hook))
        for layer in range(2):
            flat = [torch.cat([x[i][layer, begin:end] for i, begin, end in parts]).cuda() for x in (q, k, v)]
            out = plan.attend(layer, *flat, scale=SCALE, sliding_window=window).float().cpu()
            lse = seen[layer].lse_TH.cpu()
            for chunk, (i, begin, end) in zip(chunks, parts, strict=True):
                rows = slice(chunk.start, chunk.start + end - begin)
                expected, of_rows = causal(q[i][layer, begin:end], k[i][layer, :end], v[i][layer, :end], window)
                torch.testing.assert_close(out[rows], expected, **TOLERANCE)
                torch.testing.assert_close(lse[rows], of_rows, atol=1e-4, rtol=1e-4)


def causal(q_THD, k_SKD, v_SKD, window):
    """In float32, the queries being the last ones: the output, and the log-sum-exp in base e."""
    group, num_queries, num_tokens = q_THD.shape[1] // k_SKD.shape[1], len(q_THD), len(k_SKD)
    k_SHD, v_SHD = (x.float().repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    age = torch.arange(num_queries)[:, None] + num_tokens - num_queries - torch.arange(num_tokens)
    hidden = (age < 0) | (age >= (window or num_tokens))
    scores = torch.einsum("thd,shd->hts", q_THD.float(), k_SHD) * SCALE
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v_SHD), scores.logsumexp(-1).T
