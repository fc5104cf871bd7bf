"""What the FlashInfer backend decides on the host: plans, lists, choices, limits. Its answers: `tests/contract`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.attention.base import DecodeBatch
from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.bounds import gathered_products
from packlight.attention.flashinfer.choice import choose_pages
from packlight.attention.flashinfer.heads import Field
from packlight.attention.flashinfer.kernels import KernelShape, PageCounts
from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.ops import TorchPageOps
from packlight.attention.flashinfer.rating import is_mass, mass_of
from packlight.attention.flashinfer.reads import EVERYTHING, head_reads
from packlight.attention.flashinfer.workspace import fixed_workspace
from packlight.attention.flashinfer.wrappers import LIMITS, FlashInferKernels
from packlight.attention.registry import AUTO, FLASHINFER
from packlight.attention.sdpa import SdpaAttention
from packlight.compress.codecs.fp8 import FP8Codec
from packlight.compress.codecs.kivi import Int4Codec, Int8Codec
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.core.errors import ConfigError
from packlight.engine.build import build_attention
from packlight.kv.pages import PageBook
from packlight.kv.reading import PageQuery, Reading
from packlight.kv.table import HeadPageTable
from tests.support.fake_flashinfer import GROUPS, TOY_LIMITS, fake_flashinfer, fake_kernels, scheduled_bytes
from tests.support.page_heads import head_case
from tests.support.paged_rows import SCALE, PagedRows, chosen_pages, model_spec
from tests.support.tape import TapeEngine

PAGE = 4


def counted():
    """A backend, and the module that counts its plans and runs."""
    module = fake_flashinfer(TOY_LIMITS)
    return FlashInferAttention("cpu", FlashInferKernels(torch.device("cpu"), module, TOY_LIMITS)), module


def make_rows():
    return PagedRows([[[30, 17]] * 3, [[5, 9]] * 3, [[22, 40]] * 3], num_heads=4)


@pytest.mark.parametrize(
    ("lengths", "windows", "num_plans"),
    [
        ([[[9, 9]] * 4, [[30, 30]] * 4], None, 1),
        ([[[9, 9], [9, 9], [5, 5], [5, 5]]], None, 2),
        ([[[9, 7], [8, 8], [5, 5], [5, 4]]], None, 4),
        ([[[9, 9]] * 4], [None, 6, None, 6], 2),
    ],
)
def test_layers_that_hold_the_same_lengths_share_a_plan(lengths, windows, num_plans):
    backend, module = counted()
    paged = PagedRows(lengths, num_heads=4)
    for step in range(1, 4):
        paged.step(backend, paged.rows, windows=windows)
        assert (module.plans, module.runs) == (step * num_plans, step * 4)


def test_a_reader_and_dense_layers_take_one_plan_each():
    backend, module = counted()
    paged = PagedRows([[[30, 30]] * 5] * 2, num_heads=4)
    paged.step(backend, paged.rows, [Reading(QuestReader(), 3, num_dense_layers=2)] * 2)
    assert (module.plans, module.runs) == (2, 5)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (3, 1), (8, 2), (10, 2), (6, 1), (14, 2), (16, 2), (32, 2)]
)
def test_every_group_runs_where_it_has_a_kernel(num_heads, num_kv_heads):
    paged = PagedRows([[[9, 14][:num_kv_heads]] * 2], num_heads=num_heads)
    tokens = paged.new_tokens(paged.rows)
    out = paged.step(FlashInferAttention("cpu", fake_kernels()), paged.rows, tokens=tokens)
    for layer in range(2):
        expected = paged.expected(paged.rows[0], layer, tokens[0][layer, 0])
        torch.testing.assert_close(out[layer, 0], expected)


@pytest.mark.parametrize("codec", [FP8Codec, Int8Codec, Int4Codec, lambda: "fp8 pool"])
def test_pages_in_fewer_bits_are_read_as_by_other_backends(codec):
    """Decoded into scratch, of sparse rows only what is read; or in place, where they are plain FP8 numbers."""
    lengths = [[[30, 9], [22, 41]], [[7, 33], [25, 26]]]
    ours, theirs = (PagedRows(lengths, num_heads=4, head_dim=16, codec=codec()) for _ in range(2))
    backends = FlashInferAttention("cpu", fake_kernels()), SdpaAttention()
    reads = [Reading(QuestReader(), 4), None]
    for _ in range(6):
        tokens = ours.new_tokens(ours.rows)
        got, expected = (
            paged.step(backend, paged.rows, reads, tokens)
            for paged, backend in zip((ours, theirs), backends, strict=True)
        )
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_an_eager_step_fetches_nothing_from_the_device():
    """Mixed rows, sparse and dense layers, a window; a page is begun in some of the steps."""
    paged, quest, hsa = make_rows(), QuestReader(), HSAReader(num_dims=5)
    backend, reads = FlashInferAttention("cpu", fake_kernels()), (Reading(quest, 3), None, Reading(hsa, 4, 1))
    for _ in range(PAGE):
        tokens = paged.new_tokens(paged.rows)
        paged.table.grow(paged.rows)
        batch = DecodeBatch(paged.pool, paged.table, tuple(paged.rows), reads, paged.summaries)

        def step(batch=batch, tokens=tokens):
            plan = backend.plan(batch)
            for layer, window in enumerate((None, None, 6)):
                out = plan.attend(layer, *(x[layer] for x in tokens), scale=SCALE, sliding_window=window)
            return out

        TapeEngine().capture(step)
        paged.table.advance(paged.rows)


def test_what_no_kernel_computes_is_refused_with_what_does():
    backend = FlashInferAttention("cpu", fake_kernels(toy=False))
    for head_dim, dtype, what in [(80, torch.bfloat16, "head dim 80"), (64, torch.float32, "dtype torch.float32")]:
        paged = PagedRows([[[9]]], num_heads=1, head_dim=head_dim, dtype=dtype)
        with pytest.raises(ConfigError, match=f"'flashinfer': no kernel for {what}, only for .*Choose 'sdpa'"):
            paged.step(backend, paged.rows)
        with pytest.raises(ConfigError, match=what):
            backend.require(head_dim, dtype)
    backend.require(128, torch.bfloat16)


def test_without_a_gpu_it_is_refused_by_name_and_passed_over_by_auto(caplog):
    with pytest.raises(ConfigError, match="'flashinfer' needs a CUDA device, got cpu"):
        build_attention(FLASHINFER, "cpu")
    if not torch.cuda.is_available():
        assert isinstance(build_attention(AUTO, "cuda", model_spec(1, 1, 64)), SdpaAttention)
        assert [record.message for record in caplog.records] == [
            "attention by sdpa, which is slower: attention 'flashinfer' needs a CUDA device, got cuda: choose 'auto' "
            "or 'sdpa'"
        ]


@pytest.mark.parametrize("group", GROUPS)
def test_groups_may_be_sent_to_the_cuda_cores_by_name(group):
    paged = PagedRows([[[9]] * 2], num_heads=group)
    paged.step(FlashInferAttention("cpu", fake_kernels(cuda_core_groups=(group,))), paged.rows)


def test_a_library_that_breaks_at_its_import_is_passed_over(monkeypatch):
    def broken(name):
        raise RuntimeError("flashinfer-cubin version (0.7) does not match")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("packlight.attention.flashinfer.wrappers.importlib.import_module", broken)
    with pytest.raises(ConfigError, match=r"cannot be imported .*does not match"):
        FlashInferKernels.on(torch.device("cuda"))


# ── workspaces ───────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200)
@given(
    num_requests=st.integers(1, 20_000),
    group=st.integers(1, 128),
    head_dim=st.sampled_from(LIMITS.head_dims),
    on_tensor_cores=st.booleans(),
    num_multiprocessors=st.sampled_from([0, 108, 132, 148]),
)
def test_the_workspace_is_what_the_scheduler_takes(num_requests, group, head_dim, on_tensor_cores, num_multiprocessors):
    got = fixed_workspace(
        num_requests, group, head_dim, on_tensor_cores=on_tensor_cores, num_multiprocessors=num_multiprocessors
    )
    partial, schedule = scheduled_bytes(
        num_requests, group, head_dim, on_tensor_cores, num_multiprocessors=num_multiprocessors
    )
    assert partial <= got.partial_bytes <= max(128 << 20, partial + 8192)
    assert schedule <= got.schedule_bytes <= schedule + 8 * num_requests + 8192


def test_kernels_share_a_workspace_that_grows_for_who_needs_it():
    """256 rows of 8 KV heads with groups of 8: their partial results exceed what smaller steps share."""
    kernels, shape = fake_kernels(), KernelShape(8, 128, 16, torch.bfloat16, torch.bfloat16, 1.0, None)
    workspaces = []
    for num_requests in (64, 2048, 128):
        counts = PageCounts(*(np.ones(num_requests, dtype=np.int32) for _ in range(2)))
        kernel = kernels.fixed_decode(num_requests, num_requests)
        kernel.plan(counts, shape)
        workspaces.append(kernel._wrapper.workspace_bytes[0])
    assert workspaces[0] == 128 << 20
    assert workspaces[1] == workspaces[2] > 128 << 20


# ── lengths to reads ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_reads_by_hand():
    lengths = np.array([[1, 4], [5, 40], [9, 8]], dtype=np.int32)
    budgets = np.array([EVERYTHING, 3, 3], dtype=np.int32)
    reads = head_reads(lengths, PAGE, budgets, None)
    assert reads.num_read_BK.tolist() == [[1, 1], [2, 3], [3, 2]]
    assert reads.is_sparse_B.tolist() == [False, True, False]
    assert reads.counts(PAGE).last_fill_N.tolist() == [1, 4, 1, 4, 1, 4]
    assert reads.counts(PAGE).indptr.tolist() == [0, 1, 2, 4, 7, 10, 12]
    windowed = head_reads(lengths, PAGE, budgets, 5)
    assert windowed.num_read_BK.tolist() == [[1, 1], [2, 2], [2, 2]]
    assert windowed.first_BK.tolist() == [[0, 0], [0, 8], [1, 0]]
    assert not windowed.is_sparse_B.any()


@settings(max_examples=200)
@given(st.data())
def test_choices_follow_the_rule_for_every_reader(data):
    heads = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4), label="pages per head")
    budget = data.draw(st.integers(2, 12), label="budget")
    width = max(heads)
    score = st.sampled_from([-3e38, -1.0, -0.0, 0.0, 1e-30, 2.0, 3e38])
    scores = data.draw(
        st.lists(st.lists(score, min_size=width, max_size=width), min_size=len(heads), max_size=len(heads))
    )
    num_stored = torch.tensor(heads)
    num_read = num_stored.clamp(max=budget)
    chosen = choose_pages(torch.tensor(scores), num_stored, num_read, int(num_read.max())).tolist()
    for row, given_scores, num_pages, count in zip(chosen, scores, heads, num_read.tolist(), strict=True):
        assert row[:count] == chosen_pages(given_scores, num_pages, budget)
        assert set(row[count:]) <= {num_pages - 1}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("reader", [QuestReader(), HSAReader(1000), HSAReader(13)], ids=["quest", "hsa", "hsa-13"])
def test_ratings_by_rule_are_what_the_reader_says(reader, group):
    """The same scores, up to rounding, where the head has pages."""
    case = head_case(torch.float32, 40, group, 33, page_size=4, budget=5)
    heads, shape = case.heads, (len(case.heads.rows), case.heads.num_kv_heads)
    found = TorchPageOps().rate(reader.rule, case.q_XGD, SCALE, case.bounds_NE, case.table, heads)
    got_YM = mass_of(found, heads.num_tokens_YM) if is_mass(reader.rule) else found[:, 0]
    q_BKGD = case.q_XGD.index_select(0, heads[Field.ASKED]).view(*shape, group, 40)
    bounds_BKME = case.bounds_NE[heads.pages_YM(case.table).long()].view(*shape, 33, 80)
    num_tokens_BKM = heads.num_tokens_YM.view(*shape, 33)
    expected_BKM = reader.score(PageQuery(0, heads.rows, q_BKGD, SCALE, bounds_BKME, num_tokens_BKM))
    is_page_YM = case.is_page_YM
    torch.testing.assert_close(got_YM[is_page_YM], expected_BKM.flatten(0, 1)[is_page_YM], atol=1e-5, rtol=1e-5)


def test_readers_of_very_different_budgets_share_a_step():
    """Each chooses among its own rows' pages, of which the others' budget may exceed all."""
    paged = PagedRows([[[200, 180]] * 2, [[9, 20]] * 2], num_heads=4)
    reads = [Reading(QuestReader(), 40), Reading(HSAReader(8), 3)]
    tokens = paged.new_tokens(paged.rows)
    out = paged.step(FlashInferAttention("cpu", fake_kernels()), paged.rows, reads, tokens)
    others = PagedRows([[[200, 180]] * 2, [[9, 20]] * 2], num_heads=4)
    torch.testing.assert_close(out, others.step(SdpaAttention(), others.rows, reads, tokens), atol=1e-5, rtol=1e-5)


def test_products_of_pages_behind_the_last_one_are_finite():
    bounds = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    bounds[4:] = torch.tensor([torch.nan, torch.inf])[:, None]
    pages = torch.tensor([[[3, 1, 4], [0, 5, 5]]], dtype=torch.int32)
    probe = torch.ones(1, 2, 3, 8)
    products = gathered_products(probe, bounds, pages, torch.tensor([[2, 1]]))
    assert products.isfinite().all()
    torch.testing.assert_close(products[0, :, 1, 0], bounds[[3, 0]].sum(1))
    torch.testing.assert_close(products[0, 0, 2, 1], bounds[1].sum())


# ── the table on the device ──────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_mirror_follows_the_table_through_every_life_of_a_row(data):
    """Rows open, grow, close and open again; a step may leave rows out for a while."""
    table = HeadPageTable(PageBook(4000), num_rows=4, num_layers=2, num_kv_heads=2, page_size=PAGE)
    mirror, live = TableMirror(table, PAGE, torch.device("cpu")), []
    for _ in range(data.draw(st.integers(1, 40), label="steps")):
        if table.num_free_rows and (not live or data.draw(st.booleans(), label="open")):
            row = table.open()
            for layer in range(2):
                table.fill_layer(row, layer, data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=2)))
            live.append(row)
        elif live and data.draw(st.booleans(), label="close"):
            table.close(live.pop(data.draw(st.integers(0, len(live) - 1))))
        rows = [row for row in live if data.draw(st.booleans(), label="in the step")]
        for _ in range(data.draw(st.integers(1, 6)) if rows else 0):
            table.grow(rows)
            mirror.follow(table, rows)
            table_pages = table.pages
            for row in rows:
                for layer, head in np.ndindex(2, 2):
                    num_pages = -(-int(table.new_lengths([row])[0, layer, head]) // PAGE)
                    got = mirror.pages_RLKM[row, layer, head, :num_pages]
                    assert got.tolist() == table_pages[row, layer, head, :num_pages].tolist()
            table.advance(rows)


def test_the_mirror_stays_where_it_is_if_there_is_room():
    table = HeadPageTable(PageBook(400), num_rows=1, num_layers=1, num_kv_heads=1, page_size=PAGE)
    mirror = TableMirror(table, PAGE, torch.device("cpu"))
    mirror.reserve(20)
    before, row = mirror.pages_RLKM.data_ptr(), table.open()
    table.fill_layer(row, 0, [1])
    for _ in range(70):
        table.grow([row])
        mirror.follow(table, [row])
        table.advance([row])
    assert mirror.pages_RLKM.data_ptr() == before
