"""The decode kernel in every form this CPU runs: against float64, for shapes that no model has, and to the last bit
where it promises so."""

import numpy as np
import pytest
import torch

from packlight.attention.base import DecodeBatch
from packlight.attention.choice import PageChoice
from packlight.attention.cpu import CpuAttention
from packlight.attention.reference import ReferenceAttention
from packlight.compress.codecs.kivi import Int4Codec, Int8Codec
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.kv.reading import Reading
from tests.support.native import VARIANTS, open_variant
from tests.support.paged_rows import SCALE, PagedRows

# Of fp32, and of what bf16 comes out as: half a unit of its last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
PAGE = 16


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def backend(request):
    return CpuAttention(open_variant(request.param))


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def expected(paged, row, layer, q_HD, window=None):
    """In float64."""
    group = paged.num_heads // paged.num_kv_heads
    out_HD = torch.zeros(q_HD.shape, dtype=torch.float64)
    for head in range(paged.num_heads):
        k, v = (x[-window:].double() if window else x.double() for x in paged.stored[row, layer, head // group])
        out_HD[head] = torch.softmax(k @ q_HD[head].double() * SCALE, 0) @ v
    return out_HD


def check(paged, backend, *, windows=None):
    """One step of all rows."""
    tokens = paged.new_tokens(paged.rows)
    out = paged.step(backend, paged.rows, tokens=tokens, windows=windows)
    for layer in range(paged.num_layers):
        for index, row in enumerate(paged.rows):
            want = expected(paged, row, layer, tokens[0][layer, index], windows and windows[layer])
            tolerance = TOLERANCE[paged.dtype]
            torch.testing.assert_close(out[layer, index].double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", range(1, 9))
def test_any_number_of_query_heads_shares_a_kv_head(backend, dtype, group):
    check(PagedRows([[[40, 77]]], num_heads=2 * group, head_dim=64, page_size=PAGE, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (32, 16), (40, 7), (64, 1), (80, 32), (96, 48)])
def test_any_head_dim_and_page_size(backend, dtype, head_dim, page_size):
    paged = PagedRows([[[3, 90]]], num_heads=6, head_dim=head_dim, page_size=page_size, dtype=dtype)
    check(paged, backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_wide_heads(backend, dtype, head_dim):
    check(PagedRows([[[33]]], num_heads=5, head_dim=head_dim, page_size=PAGE, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lengths_around_the_ends_of_pages_blocks_and_splits(backend, dtype):
    """A row per length, each head of which has another; the new token makes them one longer."""
    ends = [0, 1, 14, 15, 16, 62, 63, 64, 127, 1022, 1023, 1024, 1087]
    lengths = [[[end, (7 * end) % 97]] for end in ends]
    check(PagedRows(lengths, num_heads=6, head_dim=64, page_size=PAGE, dtype=dtype, num_blocks=512), backend)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 63, 64, 65, 500, 5000])
def test_a_sliding_window_of_any_width(backend, window):
    paged = PagedRows([[[3, 1100]], [[64, 700]]], num_heads=6, head_dim=32, page_size=PAGE)
    check(paged, backend, windows=[window])


def test_a_token_may_be_overwritten_outside_of_the_window(backend):
    """It is stored there all the same."""
    paged = PagedRows([[[1500]]], num_heads=2, head_dim=32, page_size=PAGE)
    paged.table.overwrite[paged.rows[0]] = [[3]]
    tokens = paged.new_tokens(paged.rows)
    paged.step(backend, paged.rows, tokens=tokens, windows=[20])
    page = paged.table.pages[paged.rows[0], 0, 0, 0]
    assert torch.equal(paged.pool.k_pages[page, 3], tokens[1][0, 0, 0])
    assert torch.equal(paged.pool.v_pages[page, 3], tokens[2][0, 0, 0])


def test_scores_too_large_for_exp_are_no_trouble(backend):
    paged = PagedRows([[[100]]], num_heads=3, head_dim=64, page_size=PAGE)
    q, k, v = paged.new_tokens(paged.rows)
    out = paged.step(backend, paged.rows, tokens=(300 * q, k, v))
    want = expected(paged, paged.rows[0], 0, 300 * q[0, 0])
    torch.testing.assert_close(out[0, 0].double(), want, atol=1e-4, rtol=1e-4)


def test_nan_is_passed_on(backend):
    paged = PagedRows([[[40], [40]]], num_heads=2, head_dim=32, page_size=PAGE)
    q, k, v = paged.new_tokens(paged.rows)
    k[0, 0, 0, 5] = torch.nan
    out = paged.step(backend, paged.rows, tokens=(q, k, v))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_unused_end_of_a_page_is_never_read(backend, dtype):
    """Not even to be multiplied by zero."""
    paged = PagedRows([[[21, 64]], [[1, 1040]]], num_heads=6, head_dim=64, page_size=PAGE, dtype=dtype)
    paged.table.grow(paged.rows)
    for index in np.ndindex(paged.table.lengths[paged.rows].shape):
        row, layer, head = paged.rows[index[0]], index[1], index[2]
        page, offset = divmod(int(paged.table.lengths[row, layer, head]), PAGE)
        last = paged.table.pages[row, layer, head, page]
        paged.pool.k_pages[last, offset:] = paged.pool.v_pages[last, offset:] = torch.nan
    check(paged, backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_comes_out_the_same_to_the_last_bit_whatever_is_beside_it(backend, num_threads, dtype):
    """In any batch, on any number of threads. Rows are long enough to be split."""
    lengths = [[[2100, 900]], [[1, 1025]], [[5, 1024]]]
    together, alone = (
        PagedRows(lengths, num_heads=6, head_dim=64, page_size=PAGE, dtype=dtype, num_blocks=512) for _ in range(2)
    )
    reads = [None, Reading(QuestReader(), 5), Reading(HSAReader(num_dims=64), 70)]
    for threads in (1, 2, 3):
        tokens = together.new_tokens(together.rows)
        num_threads(threads)
        out = together.step(backend, together.rows, reads, tokens)
        num_threads(1)
        for index, row in enumerate(alone.rows):
            part = [x[:, index : index + 1] for x in tokens]
            assert torch.equal(out[:, index : index + 1], alone.step(backend, [row], [reads[index]], part))


def test_queries_keys_and_values_may_lie_anywhere(backend):
    """As slices of one merged projection, or with heads before tokens, as models hand them over."""
    paged, other = (PagedRows([[[30, 20]], [[5, 60]]], num_heads=4, head_dim=32, page_size=PAGE) for _ in range(2))
    merged = paged.random(1, 2, 8, 32)
    sliced = [merged[:, :, :4], merged[:, :, 4:6], merged[:, :, 6:]]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in sliced]
    out = paged.step(backend, paged.rows, tokens=sliced)
    assert torch.equal(out, other.step(backend, other.rows, tokens=heads_first))
    want = expected(paged, paged.rows[1], 0, sliced[0][0, 1])
    torch.testing.assert_close(out[0, 1].double(), want, atol=1e-5, rtol=1e-5)


READERS = {
    "quest": QuestReader,
    "hsa of all dims": lambda: HSAReader(num_dims=64),
    "hsa of a few": lambda: HSAReader(num_dims=9),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("make_reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("group", [1, 3, 5])
def test_the_pages_it_chooses_are_those_of_the_torch_readers(backend, dtype, make_reader, group):
    """Told by what is read: another page would change the output by far more than rounding does."""
    lengths = [[[700, 350]], [[33, 1500]], [[160, 16]]]
    budgets = [7, 20, 6]
    how = {"num_heads": 2 * group, "head_dim": 64, "page_size": PAGE, "dtype": dtype, "num_blocks": 512}
    ours, theirs = PagedRows(lengths, **how), PagedRows(lengths, **how)
    reads = [Reading(make_reader(), budget) for budget in budgets]
    for _ in range(2):
        tokens = theirs.new_tokens(theirs.rows)
        want = theirs.step(ReferenceAttention(), theirs.rows, reads, tokens)
        out = ours.step(backend, ours.rows, reads, tokens)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.float(), want.float(), atol=tolerance, rtol=tolerance)
        pages = torch.from_numpy(theirs.table.pages[theirs.rows]).long().flatten()
        assert torch.equal(ours.summaries.read(pages), theirs.summaries.read(pages))


@pytest.mark.parametrize("budget", [2, 3, 11])
def test_ties_go_to_the_earlier_page(backend, budget):
    """Every page holds the same keys, so every score is equal; values tell which pages were read."""
    paged = PagedRows([[[20 * PAGE - 1]]], num_heads=1, head_dim=64, page_size=PAGE, num_blocks=64)
    ids = torch.from_numpy(paged.table.pages[paged.rows[0], 0, 0, :20]).long()
    k_PD = paged.random(PAGE, 64)
    k_PD[-1] = k_PD[0]
    paged.pool.k_pages[ids] = k_PD
    paged.pool.v_pages[ids] = torch.arange(20.0)[:, None, None].expand(20, PAGE, 64).contiguous()
    paged.summaries.build(ids, paged.pool.k_pages[ids], torch.full((20,), PAGE))
    q, _, _ = paged.new_tokens(paged.rows)
    v = torch.full((1, 1, 1, 64), 19.0)
    out = paged.step(backend, paged.rows, [Reading(QuestReader(), budget)], (q, k_PD[None, None, None, 0], v))
    read = [*range(budget - 1), 19]
    torch.testing.assert_close(out, torch.full_like(out, sum(read) / len(read)), atol=1e-4, rtol=1e-5)


def test_torchs_choice_is_the_same_rule(backend):
    """The rule is written twice, here and in C++; this is the one that the other tests above rest on."""
    scores = torch.tensor([[[0.0, 3.0, 1.0, 3.0, -0.0, 9.0]]])
    choice = PageChoice(np.array([[6]], dtype=np.int32), np.array([[4]], dtype=np.int32), torch.device("cpu"))
    assert choice.best(scores).tolist() == [[[0, 1, 3, 5]]]


def test_a_layers_hook_is_called_with_the_models_own_query(backend):
    paged, seen = PagedRows([[[5]]], num_heads=2, head_dim=32, page_size=PAGE), []
    tokens = paged.new_tokens(paged.rows)
    paged.table.grow(paged.rows)
    batch = DecodeBatch(paged.pool, paged.table, tuple(paged.rows), on_layer=lambda *call: seen.append(call))
    plan = backend.plan(batch)
    plan.attend(0, *(x[0] for x in tokens), scale=SCALE, sliding_window=None)
    [(layer, queries)] = seen
    assert (layer, queries.scale) == (0, SCALE)
    assert torch.equal(queries.q_THD, tokens[0][0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec()])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (96, 32), (128, 64)])
def test_integer_records_are_read_as_their_codec_decodes_them(backend, dtype, codec, head_dim, page_size):
    """In place, open pages among them. Over steps that fill pages, which then are coded."""
    lengths = [[[15, 1100]], [[62, 128]]]
    how = {"num_heads": 6, "head_dim": head_dim, "page_size": page_size, "dtype": dtype, "codec": codec}
    ours, theirs = PagedRows(lengths, **how), PagedRows(lengths, **how)
    for _ in range(3):
        tokens = theirs.new_tokens(theirs.rows)
        want = theirs.step(ReferenceAttention(), theirs.rows, tokens=tokens)
        out = ours.step(backend, ours.rows, tokens=tokens)
        # The codec rounds what it decodes to bf16, the kernel does not.
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), want.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec()])
def test_integer_records_may_be_read_sparsely(backend, codec):
    how = {"num_heads": 6, "head_dim": 64, "page_size": PAGE, "codec": codec, "num_blocks": 256}
    ours, theirs = (PagedRows([[[700, 350]], [[33, 400]]], **how) for _ in range(2))
    reads = [Reading(QuestReader(), 7), None]
    for _ in range(2):
        tokens = theirs.new_tokens(theirs.rows)
        want = theirs.step(ReferenceAttention(), theirs.rows, reads, tokens)
        out = ours.step(backend, ours.rows, reads, tokens)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
