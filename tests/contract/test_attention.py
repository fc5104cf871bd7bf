"""Every attention backend does what the reference does: random ragged batches over poisoned pools.

The reference itself is held against a materialised softmax over plain contiguous tensors (`oracle`,
`PagedRows.expected`). Decoding is tested with every page reader there is, and with one whose scores are given.
"""

import numpy as np
import pytest
import torch

from packlight.attention.base import PrefillBatch, PrefillChunk
from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.registry import BACKENDS, FLASHINFER
from packlight.attention.sdpa import SdpaAttention
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.readers.freekv import FreeKVReader
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.reading import Reading
from packlight.native.compile import NativeUnavailable
from tests.support.fake_flashinfer import fake_kernels
from tests.support.paged_rows import SCALE, PagedRows, bounds_of, chosen_pages, model_spec

LAYERS, PAGE, DIM = 2, 4, 8
GROUPS = [(4, 2), (3, 3), (6, 1)]


def make_pool(num_kv_heads, dtype=torch.float32, num_blocks=64):
    pool = KVPool(model_spec(LAYERS, num_kv_heads, DIM), num_blocks=num_blocks, page_size=PAGE, dtype=dtype)
    pool.k.fill_(1e4)  # what is not stored must not matter; finite, because a page's tail is multiplied by zero
    pool.v.fill_(1e4)
    return pool


def make_rows(num_heads=4, num_kv_heads=2, *, num_rows=3, num_layers=LAYERS, low=30, high=60, **how):
    rng = np.random.default_rng(3)
    lengths = rng.integers(low, high, (num_rows, num_layers, num_kv_heads)).tolist()
    return PagedRows(lengths, num_heads=num_heads, **how)


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


def load(name):
    if name == FLASHINFER:  # its kernels need a GPU; all that decides what they read does not
        return FlashInferAttention("cpu", fake_kernels())
    try:
        return BACKENDS.load(name)()
    except NativeUnavailable as error:
        pytest.skip(error.message)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return load(request.param)


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
        hook = lambda layer, queries, seen=seen_layers: seen.append((layer, len(queries.q_THD), queries.scale))  # noqa: E731
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
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
def test_the_log_sum_exp_that_is_reported_is_that_of_all_a_row_sees(backend, window, num_heads, num_kv_heads):
    """What is stored from earlier chunks among it, and nothing of another prompt. A backend may leave it out."""
    generator = torch.Generator().manual_seed(1)
    pool, book = make_pool(num_kv_heads), PageBook(64)
    lengths, cuts = [13, 22], [[5, 13], [4, 22]]
    q, k = ([torch.randn(n, heads, DIM, generator=generator) for n in lengths] for heads in (num_heads, num_kv_heads))
    blocks = [torch.from_numpy(book.allocate(-(-n // PAGE))).long() for n in lengths]
    seen, expected = [], []
    for begins, ends in zip([[0, 0], *zip(*cuts, strict=True)], zip(*cuts, strict=True), strict=False):
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        chunks = [PrefillChunk(sum(sizes[:i]), sizes[i], begins[i], blocks[i][: -(-ends[i] // PAGE)]) for i in range(2)]
        plan = backend.plan(PrefillBatch(pool, tuple(chunks), lambda layer, queries: seen.append(queries)))
        flat_q, flat_k = (torch.cat([x[i][begins[i] : ends[i]] for i in range(2)]) for x in (q, k))
        plan.attend(0, flat_q, flat_k, flat_k, scale=SCALE, sliding_window=window)
        expected += [slow_lse(q[i], k[i], window)[begins[i] : ends[i]] for i in range(2)]
    if isinstance(backend, SdpaAttention):
        assert [queries.lse_TH for queries in seen] == [None, None]
        return
    lse_TH = torch.cat([queries.lse_TH for queries in seen])
    assert lse_TH.dtype == torch.float32
    torch.testing.assert_close(lse_TH, torch.cat(expected), atol=1e-5, rtol=1e-5)


def slow_lse(q_THD, k_SKD, window):
    """[T, H], fp32; row i sees the last `window` of the keys 0 .. i."""
    k_SHD = k_SKD.repeat_interleave(q_THD.shape[1] // k_SKD.shape[1], dim=1)
    rows = [
        torch.einsum("hd,shd->hs", q_HD, k_SHD[max(0, i + 1 - window) if window else 0 : i + 1])
        for i, q_HD in enumerate(q_THD)
    ]
    return torch.stack([(SCALE * row_HS).logsumexp(-1) for row_HS in rows])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_over_ragged_head_pages(backend, window, num_heads, num_kv_heads, dtype):
    """Each (request, layer, head) has its own stored tokens; several steps append to them."""
    paged = make_rows(num_heads, num_kv_heads, dtype=dtype, low=1, high=15)
    rows = paged.rows[::-1]
    for _ in range(6):
        tokens = paged.new_tokens(rows)
        out = paged.step(backend, rows, tokens=tokens, windows=[window] * LAYERS)
        assert out.dtype == dtype
        for layer in range(LAYERS):
            for index, row in enumerate(rows):
                expected = paged.expected(row, layer, tokens[0][layer, index], window=window)
                tolerance = 1e-5 if dtype is torch.float32 else 2e-2
                torch.testing.assert_close(out[layer, index].float(), expected, atol=tolerance, rtol=tolerance)


def test_a_new_token_may_take_the_place_of_a_stored_one(backend):
    """What eviction while decoding needs: the head keeps its length, and the victim is not seen again."""
    paged = PagedRows([[[9, 4], [8, 13]]], num_heads=4)
    row = paged.rows[0]
    for places in ([[2, -1], [7, 0]], [[8, 4], [-1, 12]], [[-1, -1], [-1, -1]]):
        paged.table.overwrite[row] = places
        tokens = paged.new_tokens([row])
        out = paged.step(backend, [row], tokens=tokens)
        for layer in range(LAYERS):
            torch.testing.assert_close(out[layer, 0], paged.expected(row, layer, tokens[0][layer, 0]))
    assert paged.table.lengths[row].tolist() == [[10, 6], [10, 14]]


def test_pages_of_others_are_not_read(backend):
    """Not even to be masked: NaN times zero is NaN. Heads of a batch differ in length, and shorter ones have no page
    where longer ones have one."""
    paged = make_rows(low=1)
    paged.table.grow(paged.rows)
    held = np.concatenate([paged.table.held(row) for row in paged.rows[:2]])
    others = np.setdiff1d(np.arange(paged.pool.num_head_pages), held)
    paged.pool.k_pages[others] = paged.pool.v_pages[others] = torch.nan
    for index in np.ndindex(paged.table.lengths.shape):
        paged.table.pages[index][paged.table.lengths[index] // PAGE + 1 :] = others[0]
    assert paged.step(backend, paged.rows[:2]).isfinite().all()


def test_a_pool_of_coded_pages_is_read_like_a_plain_one(backend):
    coded, plain = make_rows(codec=NativeCodec()), make_rows()
    reads = [None, Reading(QuestReader(), 4), Reading(HSAReader(num_dims=DIM), 50)]
    for _ in range(6):
        tokens = plain.new_tokens(plain.rows)
        assert torch.equal(
            coded.step(backend, coded.rows, reads, tokens), plain.step(backend, plain.rows, reads, tokens)
        )


def test_layers_are_reported_in_order_once_they_are_attended(backend):
    paged = PagedRows([[[5], [7]]], num_heads=2)
    tokens, seen = paged.new_tokens(paged.rows), []

    def on_layer(layer, queries):
        page, offset = divmod([5, 7][layer], PAGE)
        stored = paged.pool.k_pages[paged.table.pages[0, layer, 0, page], offset]
        is_whole = torch.equal(queries.q_THD, tokens[0][layer])
        seen.append((layer, is_whole, queries.scale, torch.equal(stored, tokens[1][layer, 0, 0])))

    paged.step(backend, paged.rows, tokens=tokens, on_layer=on_layer)
    assert seen == [(0, True, SCALE, True), (1, True, SCALE, True)]


# ── reading some of the pages ────────────────────────────────────────────────────────────────────────────────────────


class GivenScores:
    """A reader that was told everything beforehand: `scores[row][layer]` is [K, M]."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, query):
        shape = query.num_tokens_BKM.shape
        scores = torch.zeros(shape)
        for index, row in enumerate(query.rows):
            given = self.scores[row][query.layer]
            scores[index] = given[:, : shape[-1]]
        return scores

    def forget(self, row):
        pass


class Recorded:
    """Another reader's scores, kept by (row, layer)."""

    def __init__(self, reader):
        self.reader, self.scores = reader, {}

    def score(self, query):
        scores = self.reader.score(query)
        for index, row in enumerate(query.rows):
            self.scores[row, query.layer] = scores[index].tolist()
        return scores

    def forget(self, row):
        self.reader.forget(row)


MAKE_READER = {
    "quest": QuestReader,
    "hsa": lambda: HSAReader(num_dims=5),
    "freekv": lambda: FreeKVReader(cosine=0.8, num_rows=8),
}


@pytest.fixture(params=MAKE_READER)
def make_reader(request):
    return MAKE_READER[request.param]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
@pytest.mark.parametrize("budget", [2, 3, 7])
def test_given_scores_decide_what_is_read_and_nothing_else_is_touched(backend, num_heads, num_kv_heads, budget):
    """Few distinct scores, so that ties decide; heads shorter than the budget; NaN on every page that is left out."""
    paged = make_rows(num_heads, num_kv_heads, low=1)
    generator = torch.Generator().manual_seed(budget)
    values = torch.tensor([-1e30, -2.0, -0.0, 0.0, 0.5, 3e38])
    scores = {
        row: [values[torch.randint(6, (num_kv_heads, 32), generator=generator)] for _ in range(LAYERS)]
        for row in paged.rows
    }
    paged.table.grow(paged.rows)
    chosen, left_out = {}, []
    for row in paged.rows:
        for layer in range(LAYERS):
            for head in range(num_kv_heads):
                num_pages = len(paged.stored[row, layer, head][0]) // PAGE + 1
                pages = chosen_pages(scores[row][layer][head].tolist(), num_pages, budget)
                assert len(pages) == min(budget, num_pages)
                chosen[row, layer, head] = pages
                ids = paged.table.pages[row, layer, head, :num_pages]
                left_out += [page for ordinal, page in enumerate(ids) if ordinal not in pages]
    paged.pool.k_pages[left_out] = paged.pool.v_pages[left_out] = torch.nan
    tokens = paged.new_tokens(paged.rows)
    out = paged.step(backend, paged.rows, [Reading(GivenScores(scores), budget)] * 3, tokens)
    assert left_out
    for layer in range(LAYERS):
        for index, row in enumerate(paged.rows):
            heads = [chosen[row, layer, head] for head in range(num_kv_heads)]
            expected = paged.expected(row, layer, tokens[0][layer, index], heads)
            torch.testing.assert_close(out[layer, index], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_output_is_dense_attention_over_the_pages_that_score_best(backend, make_reader, dtype):
    """Over steps that fill pages and begin new ones."""
    paged, reader = make_rows(dtype=dtype), Recorded(make_reader())
    budgets = dict(zip(paged.rows, (3, 6, 9), strict=True))
    for _ in range(6):
        tokens = paged.new_tokens(paged.rows)
        out = paged.step(backend, paged.rows, [Reading(reader, budgets[row]) for row in paged.rows], tokens)
        for layer in range(LAYERS):
            for index, row in enumerate(paged.rows):
                num_pages = [paged.num_pages(row, layer, head) for head in range(2)]
                if max(num_pages) <= budgets[row]:
                    chosen = None
                else:
                    scores = reader.scores[row, layer]
                    chosen = [chosen_pages(scores[head], num_pages[head], budgets[row]) for head in range(2)]
                expected = paged.expected(row, layer, tokens[0][layer, index], chosen)
                tolerance = 1e-5 if dtype is torch.float32 else 2e-2
                torch.testing.assert_close(out[layer, index].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_that_covers_all_pages_is_dense_to_the_last_bit(backend, make_reader, dtype):
    reads, plain = make_rows(dtype=dtype), make_rows(dtype=dtype)
    reader = make_reader()
    for _ in range(4):
        tokens = plain.new_tokens(plain.rows)
        got = reads.step(backend, reads.rows, [Reading(reader, 17)] * 3, tokens)
        assert torch.equal(got, plain.step(backend, plain.rows, tokens=tokens))


def test_summaries_follow_every_stored_token(backend, make_reader):
    """Also in layers where the row still reads everything, and for rows beside it that do not need them."""
    paged = make_rows(low=1)
    reader = make_reader()
    reads = [Reading(reader, 4), None, Reading(reader, 50, num_dense_layers=1)]
    untouched = paged.summaries.read(torch.arange(paged.pool.num_head_pages))
    for _ in range(9):
        paged.step(backend, paged.rows, reads)
    for row, layers in zip(paged.rows, ([0, 1], [], [1]), strict=True):
        for layer in range(LAYERS):
            for head in range(2):
                ids = torch.tensor(paged.page_ids(row, layer, head))
                expected = bounds_of(paged.stored[row, layer, head][0], PAGE) if layer in layers else untouched[ids]
                assert torch.equal(paged.summaries.read(ids), expected)


def test_first_layers_and_sliding_windows_are_read_densely(backend):
    """The reader is not even asked there."""
    paged = make_rows(num_layers=4)
    reader, tokens = Recorded(QuestReader()), paged.new_tokens(paged.rows)
    reads = [Reading(reader, 3, num_dense_layers=2)] * 3
    out = paged.step(backend, paged.rows, reads, tokens, windows=[None, 5, 9, None])
    assert {layer for _, layer in reader.scores} == {3}
    for layer, window in enumerate([None, 5, 9]):
        for index, row in enumerate(paged.rows):
            expected = paged.expected(row, layer, tokens[0][layer, index], window=window)
            torch.testing.assert_close(out[layer, index], expected, atol=1e-6, rtol=1e-5)


def test_a_mixed_batch_is_its_parts_run_alone(backend):
    """Dense rows, two readers, rows that share one: what stands beside a row does not change it."""
    together, alone = make_rows(num_rows=5), make_rows(num_rows=5)
    readers = [[MAKE_READER[name]() for name in ("quest", "hsa", "freekv")] for _ in range(2)]
    pick = [None, 0, 1, 2, 0]
    mixed, single = ([None if which is None else Reading(own[which], 4) for which in pick] for own in readers)
    for _ in range(5):
        tokens = together.new_tokens(together.rows)
        out = together.step(backend, together.rows, mixed, tokens)
        for index, row in enumerate(alone.rows):
            part = [x[:, index : index + 1] for x in tokens]
            torch.testing.assert_close(
                out[:, index : index + 1], alone.step(backend, [row], [single[index]], part), atol=1e-6, rtol=1e-5
            )


def test_backends_read_the_same_pages_step_after_step(make_reader):
    """A reader's memory included: each backend has its own, and asks it in another way."""
    worlds = [(load(name), make_rows(), make_reader()) for name in BACKENDS]
    q = None
    for _ in range(8):
        fresh_q, k, v = worlds[0][1].new_tokens(worlds[0][1].rows)
        q = fresh_q if q is None else 0.9 * q + 0.4 * fresh_q
        outs = [
            paged.step(backend, paged.rows, [Reading(reader, budget) for budget in (3, 5, 7)], (q, k, v))
            for backend, paged, reader in worlds
        ]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], atol=1e-6, rtol=1e-5)
