"""What holds for every page reader, and each method's formula against a slow one."""

import gc
from dataclasses import replace
from math import exp, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.parts import READERS
from packlight.compress.readers.bounds import bound_probe, page_products
from packlight.compress.readers.freekv import FreeKVReader
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.compress.readers.shared import Readers
from packlight.compress.recipes import RECIPES
from packlight.core.types import PackSpec
from packlight.kv.reading import MIN_PAGES, PageQuery
from tests.support.paged_rows import bounds_of

SPARSE = [name for name in READERS if name != "dense"]
RECIPE_OF = {name: next(recipe.name for recipe in RECIPES.values() if recipe.reader == name) for name in SPARSE}
PAGE, DIM, HEADS, GROUP, SCALE = 4, 8, 2, 3, 0.35


@pytest.fixture(params=SPARSE)
def reader(request):
    """With its default constants, as a decode worker makes it."""
    readers = Readers(page_size=PAGE, head_dim=DIM, num_rows=8)
    return readers.reading_of(PackSpec(RECIPE_OF[request.param], ratio=0.25), 1000).reader


def make_query(lengths, *, seed=0, layer=0, rows=None, q=None, scale=SCALE):
    """Random keys in pages; `lengths[b][k]` tokens. Where a head has fewer pages than others: something finite."""
    generator = torch.Generator().manual_seed(seed)
    num_pages = max(-(-length // PAGE) for row in lengths for length in row)
    bounds = torch.full((len(lengths), HEADS, num_pages, 2 * DIM), 1e3)
    num_tokens = torch.zeros(len(lengths), HEADS, num_pages, dtype=torch.int64)
    keys = {}
    for b, row in enumerate(lengths):
        for head, length in enumerate(row):
            keys[b, head] = torch.randn(length, DIM, generator=generator)
            own = bounds_of(keys[b, head], PAGE)
            bounds[b, head, : len(own)] = own
            counts = [min(PAGE, length - start) for start in range(0, length, PAGE)]
            num_tokens[b, head, : len(own)] = torch.tensor(counts)
    if q is None:
        q = torch.randn(len(lengths), HEADS, GROUP, DIM, generator=generator)
    return PageQuery(layer, rows or list(range(len(lengths))), q, scale, bounds, num_tokens), keys


def take(query, index):
    """Some rows of it, in this order."""
    rows = [query.rows[b] for b in index]
    tensors = {name: getattr(query, name)[index] for name in ("q_BKGD", "bounds_BKME", "num_tokens_BKM")}
    return replace(query, rows=rows, **tensors)


def pages_of(query, b, head):
    return int((query.num_tokens_BKM[b, head] > 0).sum())


LENGTHS = [[30, 41], [9, 55], [23, 4]]


# ── every reader ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_finite_and_one_per_page(reader):
    query, _ = make_query(LENGTHS)
    scores = reader.score(query)
    assert scores.shape == query.num_tokens_BKM.shape
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_scores_do_not_depend_on_what_stands_beside(reader):
    """Other rows, pages that are not there, the order of KV heads."""
    query, _ = make_query(LENGTHS)
    scores = reader.score(query)
    for b in range(len(LENGTHS)):
        torch.testing.assert_close(reader.score(take(query, [b])), scores[b : b + 1], atol=1e-6, rtol=1e-5)
    emptied = query.bounds_BKME.masked_fill((query.num_tokens_BKM == 0)[..., None], -77.0)
    other = reader.score(replace(query, bounds_BKME=emptied))
    flipped = {name: getattr(query, name).flip(1) for name in ("q_BKGD", "bounds_BKME", "num_tokens_BKM")}
    swapped = reader.score(replace(query, layer=1, **flipped)).flip(1)
    for b in range(len(LENGTHS)):
        for head in range(HEADS):
            there = slice(pages_of(query, b, head))
            torch.testing.assert_close(other[b, head, there], scores[b, head, there])
            torch.testing.assert_close(swapped[b, head, there], scores[b, head, there])


def test_inputs_are_left_as_they_are(reader):
    query, _ = make_query(LENGTHS)
    before = [x.clone() for x in (query.q_BKGD, query.bounds_BKME, query.num_tokens_BKM)]
    reader.score(query)
    for x, old in zip((query.q_BKGD, query.bounds_BKME, query.num_tokens_BKM), before, strict=True):
        assert torch.equal(x, old)


def test_half_precision_queries_and_queries_of_zeros_can_be_scored(reader):
    query, _ = make_query(LENGTHS)
    assert reader.score(replace(query, q_BKGD=query.q_BKGD.bfloat16())).dtype == torch.float32
    assert reader.score(replace(query, layer=1, q_BKGD=query.q_BKGD * 0)).isfinite().all()


@settings(max_examples=30)
@given(st.integers(0, 13), st.integers(0, HEADS - 1), st.integers(0, 2**31))
@pytest.mark.parametrize("name", SPARSE)
def test_the_page_that_holds_the_needle_scores_best(name, page, head, seed):
    """A key along the group's queries, longer than all others."""
    readers = Readers(page_size=PAGE, head_dim=DIM, num_rows=8)
    reader = readers.reading_of(PackSpec(RECIPE_OF[name], ratio=0.25), 1000).reader
    query, keys = make_query([[56, 56]], seed=seed)
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)), dim=0)
    query.q_BKGD[0, head] = 3 * direction
    keys[0, head][page * PAGE + seed % PAGE] = 20 * direction
    query.bounds_BKME[0, head] = bounds_of(keys[0, head], PAGE)
    assert reader.score(query)[0, head].argmax() == page


def test_forgetting_rows_that_were_never_seen_does_no_harm(reader):
    for row in (0, 7, 0):
        reader.forget(row)


# ── Quest ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=100)
@given(st.integers(1, 3 * PAGE), st.sampled_from([1e-3, 1.0, 50.0]), st.integers(0, 2**31))
def test_quests_score_bounds_the_product_with_every_key_of_the_page(length, spread, seed):
    query, keys = make_query([[length, length]], seed=seed)
    q_BKGD = query.q_BKGD * spread
    bound_KGM = page_products(bound_probe(q_BKGD), query.bounds_BKME)[0]
    for head in range(HEADS):
        for index, key in enumerate(keys[0, head]):
            products_G = q_BKGD[0, head] @ key
            assert (products_G <= bound_KGM[head, :, index // PAGE] + 1e-5 * spread).all()


def test_quest_sums_the_bounds_of_the_group():
    query, _ = make_query(LENGTHS)
    scores = QuestReader().score(query)
    for b in range(len(LENGTHS)):
        for head in range(HEADS):
            for page in range(pages_of(query, b, head)):
                low, high = query.bounds_BKME[b, head, page].split(DIM)
                expected = sum(
                    max(float(q[j] * low[j]), float(q[j] * high[j])) for q in query.q_BKGD[b, head] for j in range(DIM)
                )
                assert float(scores[b, head, page]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


# ── HSA ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def hsa_scores(q_GD, bounds_ME, counts, num_dims, scale):
    """Attention over one representative key per page, in plain numbers."""
    q = q_GD.double().tolist()
    strength = [sum(abs(row[j]) for row in q) for j in range(DIM)]
    dims = sorted(sorted(range(DIM), key=lambda j: (-strength[j], j))[:num_dims])
    sign = [sum(row[j] for row in q) > 0 for j in range(DIM)]
    total = [0.0] * len(counts)
    for row in q:
        share = sum(abs(row[j]) for j in dims) / sum(map(abs, row))
        temperature = sqrt(share) / scale
        logits = [
            sum(row[j] * float(bounds[DIM + j] if sign[j] else bounds[j]) for j in dims) / temperature
            for bounds in bounds_ME
        ]
        weights = [count * exp(logit) for logit, count in zip(logits, counts, strict=True)]
        for page, weight in enumerate(weights):
            total[page] += weight / sum(weights) / len(q)
    return total


@pytest.mark.parametrize("num_dims", [1, 3, 5, DIM])
def test_hsa_is_attention_over_page_representatives(num_dims):
    query, _ = make_query(LENGTHS)
    scores = HSAReader(num_dims).score(query)
    for b in range(len(LENGTHS)):
        for head in range(HEADS):
            there = pages_of(query, b, head)
            expected = hsa_scores(
                query.q_BKGD[b, head],
                query.bounds_BKME[b, head, :there],
                query.num_tokens_BKM[b, head, :there].tolist(),
                num_dims,
                SCALE,
            )
            torch.testing.assert_close(scores[b, head, :there], torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_hsa_reads_as_many_dims_as_its_split_says():
    """All of them with pages of 16 tokens; fewer with the paper's small ones."""
    spec = PackSpec("rocketkv", budget_tokens=512)
    dims = {
        page_size: Readers(page_size=page_size, head_dim=128, num_rows=1).reading_of(spec, 32768).reader.num_dims
        for page_size in (1, 2, 4, 16)
    }
    assert dims[16] == 128
    assert dims[1] < dims[2] < dims[4] < 128


# ── FreeKV ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def freekv_scores(query, b, head):
    """What the current query alone says: mean over the group of the softmax of its bounds over stored tokens."""
    there = pages_of(query, b, head)
    low, high = query.bounds_BKME[b, head, :there].split(DIM, dim=-1)
    total = torch.zeros(there)
    for q in query.q_BKGD[b, head]:
        bound = torch.maximum(q * low, q * high).sum(-1) * query.scale
        weights = bound.exp() * query.num_tokens_BKM[b, head, :there]
        total += weights / weights.sum() / GROUP
    return total


def assert_scored_by(scores, query, b, head):
    there = pages_of(query, b, head)
    torch.testing.assert_close(scores[b, head, :there], freekv_scores(query, b, head), atol=1e-6, rtol=1e-4)


@pytest.fixture
def two_queries():
    first, _ = make_query(LENGTHS)
    return first, replace(first, q_BKGD=torch.randn(first.q_BKGD.shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("cosine", [-1.0, 0.8, 1.0])
def test_freekvs_first_step_is_scored_by_its_own_query(two_queries, cosine):
    scores = FreeKVReader(cosine, num_rows=8).score(two_queries[0])
    for b in range(len(LENGTHS)):
        for head in range(HEADS):
            assert_scored_by(scores, two_queries[0], b, head)


@pytest.mark.parametrize(("cosine", "scored_by"), [(-1.0, 0), (1.0, 1)])
def test_freekv_never_corrects_at_minus_one_and_always_at_one(two_queries, cosine, scored_by):
    reader = FreeKVReader(cosine, num_rows=8)
    reader.score(two_queries[0])
    for step in (1, 2):
        scores = reader.score(two_queries[1])
        for b in range(len(LENGTHS)):
            for head in range(HEADS):
                assert_scored_by(scores, two_queries[scored_by if step == 1 else 1], b, head)


def test_freekv_never_corrects_at_minus_one_even_when_the_query_turns_round():
    """A cosine may be rounded to less than -1: enough rows for that to happen."""
    query, _ = make_query([[9, 9]] * 200)
    reader = FreeKVReader(-1.0, num_rows=200)
    first = reader.score(query)
    assert torch.equal(reader.score(replace(query, q_BKGD=-query.q_BKGD)), first)


def test_freekv_says_the_same_of_the_same_query(two_queries):
    reader = FreeKVReader(0.8, num_rows=8)
    assert torch.equal(reader.score(two_queries[0]), reader.score(two_queries[0]))


def test_freekv_corrects_each_kv_head_on_its_own_by_the_mean_of_its_group(two_queries):
    """Head 0: two of three queries turn by 90 degrees, mean cosine 1/3. Head 1: one of three does, mean 2/3."""
    reader, first = FreeKVReader(0.5, num_rows=8), two_queries[0]
    basis = torch.eye(DIM)
    old = basis[0].expand(first.q_BKGD.shape).clone()
    new = old.clone()
    new[:, 0, :2] = basis[1]
    new[:, 1, :1] = basis[2]
    before, after = replace(first, q_BKGD=old), replace(first, q_BKGD=new)
    reader.score(before)
    scores = reader.score(after)
    for b in range(len(LENGTHS)):
        assert_scored_by(scores, after, b, 0)
        assert_scored_by(scores, before, b, 1)


def test_freekv_remembers_by_row_and_layer_until_the_row_is_forgotten(two_queries):
    reader, (first, second) = FreeKVReader(-1.0, num_rows=8), two_queries
    reader.score(first)
    reader.forget(1)
    reordered = [2, 0, 1]
    scores = reader.score(take(second, reordered))
    for place, row in enumerate(reordered):
        for head in range(HEADS):
            there = pages_of(first, row, head)
            expected = freekv_scores(second if row == 1 else first, row, head)
            torch.testing.assert_close(scores[place, head, :there], expected, atol=1e-6, rtol=1e-4)
    other_layer = reader.score(replace(second, layer=1))
    assert_scored_by(other_layer, second, 0, 0)


# ── the readers of a worker ──────────────────────────────────────────────────────────────────────────────────────────


def make_readers():
    return Readers(page_size=16, head_dim=64, num_rows=4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gets_the_reader_of_its_row_with_its_budget_in_whole_pages(recipe):
    spec = PackSpec(recipe, budget_tokens=200) if RECIPES[recipe].has_budget else PackSpec(recipe)
    reading = make_readers().reading_of(spec, 1000)
    if not RECIPES[recipe].reads_pages:
        assert reading is None
        return
    assert READERS[RECIPES[recipe].reader].endswith(f":{type(reading.reader).__name__}")
    tokens = 100 if RECIPES[recipe].drops_tokens else 200
    assert reading.num_pages == tokens // 16
    assert reading.num_dense_layers == (2 if recipe == "quest" else 0)


@pytest.mark.parametrize("recipe", ["quest", "freekv", "rocketkv"])
def test_a_budget_that_covers_the_prompt_reads_densely(recipe):
    assert make_readers().reading_of(PackSpec(recipe, budget_tokens=1000), 1000) is None
    assert make_readers().reading_of(PackSpec(recipe, ratio=1.0), 1000) is None


def test_a_tiny_budget_still_reads_the_first_page_and_the_last():
    assert make_readers().reading_of(PackSpec("quest", budget_tokens=1), 1000).num_pages == MIN_PAGES


def test_equal_constants_share_a_reader_and_other_constants_do_not():
    readers = make_readers()
    specs = [
        PackSpec("freekv", ratio=0.5),
        PackSpec("freekv", ratio=0.1),
        PackSpec("freekv", ratio=0.5, params=(("cosine", 0.9),)),
    ]
    a, b, c = (readers.reading_of(spec, 1000) for spec in specs)
    assert a.reader is b.reader
    assert a.reader is not c.reader
    assert (a.reader.cosine, c.reader.cosine) == (0.8, 0.9)
    assert a.num_pages != b.num_pages


def test_a_reader_that_no_request_holds_is_not_kept():
    readers = make_readers()
    for step in range(100):
        readers.reading_of(PackSpec("freekv", ratio=0.5, params=(("cosine", step / 100),)), 1000)
    gc.collect()
    assert len(readers._readers) <= 1


def test_forgetting_a_row_reaches_every_reader(two_queries):
    readers = Readers(page_size=PAGE, head_dim=DIM, num_rows=8)
    reader = readers.reading_of(PackSpec("freekv", ratio=0.5, params=(("cosine", -1.0),)), 1000).reader
    reader.score(two_queries[0])
    readers.forget(0)
    scores = reader.score(two_queries[1])
    assert_scored_by(scores, two_queries[1], 0, 0)
    assert_scored_by(scores, two_queries[0], 1, 0)
