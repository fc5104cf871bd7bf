"""The native prefill kernel, in every form this CPU runs: right, and right to the same bits however it is called."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.attention.base import PrefillBatch, PrefillChunk
from packlight.attention.cpu_prefill import CpuPrefill
from packlight.kv.pool import KVPool
from tests.support.native import VARIANTS, open_variant
from tests.support.paged_rows import model_spec

NUM_LAYERS, LAYER = 2, 1
# (query heads, KV heads, head dim, page size): groups of 1 to 8, dims from 16 to 256 and odd ones, pages of any size.
SHAPES = [
    (9, 3, 64, 16),
    (4, 2, 128, 16),
    (8, 1, 64, 32),
    (7, 1, 40, 24),
    (5, 5, 16, 5),
    (6, 3, 256, 16),
    (4, 1, 80, 1),
]
# How far bf16 may be off, as a share of the largest value: outputs and weights are rounded to 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def library(request):
    return open_variant(request.param)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Prompts:
    """Prompts of given lengths in one pool, whose blocks are dealt in random order; all else in the pool is NaN."""

    def __init__(self, lengths, shape, dtype, *, seed=0, spread=2.0):
        self.num_heads, num_kv_heads, head_dim, self.page_size = shape
        generator = torch.Generator().manual_seed(seed)
        num_blocks = sum(-(-n // self.page_size) for n in lengths)
        spec = model_spec(NUM_LAYERS, num_kv_heads, head_dim)
        self.pool = KVPool(spec, num_blocks=num_blocks + 1, page_size=self.page_size, dtype=dtype)
        self.pool.k.fill_(torch.nan)
        self.pool.v.fill_(torch.nan)
        dealt = torch.randperm(num_blocks, generator=generator)
        self.blocks = list(dealt.split([-(-n // self.page_size) for n in lengths]))
        self.q, self.k, self.v = (
            [torch.randn(n, heads, head_dim, generator=generator).mul(size).to(dtype) for n in lengths]
            for heads, size in ((self.num_heads, spread), (num_kv_heads, 1), (num_kv_heads, 1))
        )
        self.scale = head_dim**-0.5

    def step(self, library, parts, *, window=None, on_layer=None):
        """One batch of (prompt, begin, end); the outputs of each part."""
        chunks, start = [], 0
        for i, begin, end in parts:
            chunks.append(PrefillChunk(start, end - begin, begin, self.blocks[i][: -(-end // self.page_size)]))
            start += end - begin
        flat = [torch.cat([x[i][begin:end] for i, begin, end in parts]) for x in (self.q, self.k, self.v)]
        plan = CpuPrefill(PrefillBatch(self.pool, tuple(chunks), on_layer), library)
        out = plan.attend(LAYER, *flat, scale=self.scale, sliding_window=window)
        return out.split([end - begin for _, begin, end in parts])

    def whole(self, library, i, *, cuts=(), window=None):
        """The prompt's output, computed in chunks that end at `cuts`."""
        ends = [*cuts, len(self.q[i])]
        return torch.cat(
            [self.step(library, [(i, a, b)], window=window)[0] for a, b in zip([0, *cuts], ends, strict=True)]
        )

    def scores(self, i, window=None, begin=0):
        """[H, T - begin, T], -inf where a token does not look."""
        q, k = self.q[i][begin:].double(), self.k[i].double()
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * self.scale
        age = torch.arange(begin, len(k))[:, None] - torch.arange(len(k))[None]
        return scores.masked_fill((age < 0) | (age >= (window or len(k))), -torch.inf)

    def expected(self, i, window=None, begin=0):
        """Of the rows from `begin` on."""
        v = self.v[i].double().repeat_interleave(self.num_heads // self.v[i].shape[1], 1)
        return torch.einsum("hts,shd->thd", self.scores(i, window, begin).softmax(-1), v)


def assert_close(got, expected, dtype):
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_prompts_in_one_batch(library, shape, window, dtype):
    """Two steps: chunks that begin prompts, then chunks behind stored tokens and within pages; a prompt of one."""
    prompts = Prompts([331, 17, 1, 64], shape, dtype)
    first = prompts.step(library, [(0, 0, 270), (1, 0, 3)], window=window)
    second = prompts.step(library, [(1, 3, 17), (2, 0, 1), (0, 270, 331), (3, 0, 64)], window=window)
    got = {0: [first[0], second[2]], 1: [first[1], second[0]], 2: [second[1]], 3: [second[3]]}
    for i, parts in got.items():
        assert_close(torch.cat(parts), prompts.expected(i, window), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_stored_and_nothing_else_is_touched(library, dtype):
    prompts = Prompts([45, 20], (4, 2, 64, 16), dtype)
    prompts.step(library, [(0, 0, 30), (1, 0, 20)])
    prompts.step(library, [(0, 30, 45)])
    for i in range(2):
        stored_k, stored_v = prompts.pool.read_blocks(LAYER, prompts.blocks[i], len(prompts.k[i]))
        assert torch.equal(stored_k, prompts.k[i].transpose(0, 1))
        assert torch.equal(stored_v, prompts.v[i].transpose(0, 1))
    assert int(prompts.pool.k.isfinite().sum()) == int(prompts.pool.v.isfinite().sum()) == (45 + 20) * 2 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (8, 2, 128, 16), (3, 3, 40, 24)])
def test_cutting_a_prompt_changes_no_bit(library, threads, shape, window, dtype):
    """What a prefix-cache hit must give: the same numbers as a cold prompt, to the last bit."""
    prompts = Prompts([700], shape, dtype)
    whole = prompts.whole(library, 0, window=window)
    for cuts in ([512], [1, 2, 255, 256, 257], [16, 699], [333]):
        assert torch.equal(prompts.whole(library, 0, cuts=cuts, window=window), whole), cuts
    for num_threads in (1, 3):
        threads(num_threads)
        assert torch.equal(prompts.whole(library, 0, cuts=[400], window=window), whole), num_threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (4, 2, 128, 32), (7, 1, 40, 24), (2, 2, 32, 8)])
def test_few_rows_behind_many_keys(library, shape, window, dtype):
    """As after a prefix hit, alone and beside others: contexts that end within pages and within blocks of keys, pages
    whose keys lie as products take them and others, and NaN in the pool behind the last token."""
    num_rows = {650: 1, 523: 11, 700: 34, 599: 80}  # by the prompt's length
    prompts = Prompts(list(num_rows), shape, dtype)
    whole = [prompts.whole(library, i, window=window) for i in range(len(num_rows))]
    parts = [(i, length - rows, length) for i, (length, rows) in enumerate(num_rows.items())]
    together = prompts.step(library, parts, window=window)
    for (i, begin, end), got in zip(parts, together, strict=True):
        assert torch.equal(got, whole[i][begin:])
        assert torch.equal(got, prompts.step(library, [(i, begin, end)], window=window)[0])
        assert_close(got, prompts.expected(i, window, begin), dtype)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 399), max_size=6), others=st.lists(st.integers(1, 90), max_size=3))
def test_neighbours_and_cuts_change_no_bit(cuts, others):
    library = open_variant(VARIANTS[0])
    prompts = Prompts([400, *others], (9, 3, 64, 16), torch.bfloat16)
    alone = prompts.whole(library, 0)
    ends, got = [*sorted(cuts), 400], []
    for begin, end in zip([0, *ends], ends, strict=False):
        got.append(prompts.step(library, [*((i + 1, 0, n) for i, n in enumerate(others)), (0, begin, end)])[-1])
    assert torch.equal(torch.cat(got), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_may_be_slices_of_one_tensor(library, dtype):
    """As a merged projection leaves them: tokens and heads with strides of their own."""
    prompts = Prompts([50], (6, 2, 64, 16), dtype)
    expected = prompts.whole(library, 0)
    merged = torch.cat([prompts.q[0], prompts.k[0], prompts.v[0]], dim=1)
    turned = merged.transpose(0, 1).contiguous().transpose(0, 1)
    for flat in (merged, turned):
        plan = CpuPrefill(PrefillBatch(prompts.pool, (PrefillChunk(0, 50, 0, prompts.blocks[0]),)), library)
        out = plan.attend(LAYER, flat[:, :6], flat[:, 6:8], flat[:, 8:], scale=prompts.scale, sliding_window=None)
        assert torch.equal(out, expected)


def test_the_hook_comes_after_the_layer_is_stored_and_attended(library):
    prompts, seen = Prompts([20], (4, 2, 16, 4), torch.float32), []

    def on_layer(layer, queries):
        stored_k, _ = prompts.pool.read_blocks(LAYER, prompts.blocks[0], 20)
        is_stored = torch.equal(stored_k, prompts.k[0].transpose(0, 1))
        seen.append((layer, torch.equal(queries.q_THD, prompts.q[0]), queries.scale, is_stored))

    prompts.step(library, [(0, 0, 20)], on_layer=on_layer)
    assert seen == [(LAYER, True, prompts.scale, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_sum_exp_of_every_row(library, shape, window, dtype):
    """Of the keys behind the chunk as well; to the same bits however a prompt is cut."""
    prompts, seen = Prompts([331, 17], shape, dtype), []
    hook = lambda layer, queries: seen.append(queries.lse_TH)  # noqa: E731
    prompts.step(library, [(0, 0, 331), (1, 0, 17)], window=window, on_layer=hook)
    for part in ((0, 0, 270), (0, 270, 331), (1, 0, 17)):
        prompts.step(library, [part], window=window, on_layer=hook)
    whole, *cut = seen
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat(cut))
    expected = torch.cat([prompts.scores(i, window).logsumexp(-1).T for i in range(2)])
    torch.testing.assert_close(whole.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharp_and_huge_scores(library, dtype):
    """A softmax of one key, maxima that rise from block to block, and scores that overflow a plain exponential. Scores
    are rounded before they are powers, so torch is as far off."""
    prompts = Prompts([900], (2, 1, 64, 16), dtype, spread=40.0)
    prompts.k[0] *= torch.linspace(0.1, 6, 900)[:, None, None].to(dtype)
    expected = prompts.expected(0)
    q, k, v = (x[0].transpose(0, 1)[None] for x in (prompts.q, prompts.k, prompts.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=prompts.scale, enable_gqa=True)
    torch_error = (out[0].transpose(0, 1).double() - expected).abs().max()
    error = (prompts.whole(library, 0).double() - expected).abs().max()
    assert error < 2 * torch_error, (error, torch_error)


def test_equal_values_come_out_as_they_are(library):
    """Weights add up to one: whatever the scores, an average of equal values is that value."""
    prompts = Prompts([600], (3, 1, 64, 16), torch.float32)
    prompts.v[0][:] = torch.linspace(-1, 1, 64)
    got = prompts.whole(library, 0)
    torch.testing.assert_close(got, prompts.v[0].expand_as(got), rtol=1e-6, atol=1e-6)


def test_nan_in_a_query_stays_in_its_row(library):
    prompts = Prompts([80], (4, 2, 64, 16), torch.bfloat16)
    clean = prompts.whole(library, 0)
    prompts.q[0][33, 2, 5] = torch.nan
    got = prompts.whole(library, 0)
    is_nan = np.zeros((80, 4), dtype=bool)
    is_nan[33, 2] = True
    assert (got.isnan().all(-1).numpy() == is_nan).all()
    assert torch.equal(got[~torch.from_numpy(is_nan)], clean[~torch.from_numpy(is_nan)])
