"""While decoding, the same pages are read and the same tokens dropped as by slow references written from the papers."""

import pytest
import torch

from packlight.compress.evict import Arrived, HeavyHitters, replay
from packlight.compress.parts import READERS
from packlight.compress.readers.freekv import FreeKVReader
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.core.types import PackSpec
from packlight.kv.reading import PageQuery
from tests.oracles import freekv, h2o, hsa, quest
from tests.oracles.plain import margin

HEADS, GROUP, DIM = 2, 3, 8
SCALE = DIM**-0.5
# Tokens of each row's heads: ragged, with full and part-filled last pages.
LENGTHS = [[64, 37], [48, 50], [33, 61]]


def random_keys(generator):
    """[B][K] of keys [S, D]."""
    return [[2 * torch.randn(length, DIM, generator=generator) for length in row] for row in LENGTHS]


def paged(k_SD, page_size):
    return [page.tolist() for page in k_SD.split(page_size)]


def page_query(rows, q_BKGD, keys, page_size):
    """What a backend would pass, with rubbish where there is no page."""
    pages = [[k_SD.split(page_size) for k_SD in row] for row in keys]
    num_pages = max(len(head) for row in pages for head in row)
    bounds = torch.full((len(rows), HEADS, num_pages, 2 * DIM), 1e4)
    num_tokens = torch.zeros(len(rows), HEADS, num_pages, dtype=torch.int64)
    for at, row in enumerate(pages):
        for head, split in enumerate(row):
            for ordinal, k_PD in enumerate(split):
                bounds[at, head, ordinal] = torch.cat([k_PD.amin(dim=0), k_PD.amax(dim=0)])
                num_tokens[at, head, ordinal] = len(k_PD)
    return PageQuery(0, rows, q_BKGD, SCALE, bounds, num_tokens)


def check(scores_BKM, expected, num_read):
    """The same scores, up to the 24 bits of fp32, and so the same pages."""
    for scores_KM, expected_K in zip(scores_BKM.tolist(), expected, strict=True):
        for scores_M, scores in zip(scores_KM, expected_K, strict=True):
            scores_M, num_free = scores_M[: len(scores)], num_read - 2
            assert scores_M == pytest.approx(scores, rel=1e-5, abs=1e-9)
            assert not 0 < num_free < len(scores) - 2 or margin(scores[1:-1], num_free) > 2e-5, "nearly tied"
            assert quest.chosen(scores_M, num_read, num_first=1) == quest.chosen(scores, num_read, num_first=1)


def per_head(score, q_BKGD, keys, page_size):
    return [
        [score(q_GD.tolist(), paged(k_SD, page_size)) for q_GD, k_SD in zip(q_KGD, row, strict=True)]
        for q_KGD, row in zip(q_BKGD, keys, strict=True)
    ]


def quest_scores(queries, pages):
    """Our group reads the same pages, so the bounds of its queries are added."""
    return [sum(quest.bound(query, keys) for query in queries) for keys in pages]


def hsa_scores(num_dims):
    """A page is rated by all of its tokens together: the paper's token shares, added up."""

    def scores(queries, pages):
        shares = hsa.page_scores(queries, pages, num_dims, per_token=True)
        return [share * len(keys) for share, keys in zip(shares, pages, strict=True)]

    return scores


def freekv_scores(queries, pages):
    """As for HSA: a last page counts as often as it holds tokens. The paper's pages are full."""
    shares = freekv.page_scores(queries, pages, SCALE, per_token=True)
    return [share * len(keys) for share, keys in zip(shares, pages, strict=True)]


READER_ORACLES = {
    "quest": [(QuestReader, quest_scores)],
    "hsa": [(lambda num_dims=num_dims: HSAReader(num_dims), hsa_scores(num_dims)) for num_dims in (8, 5, 1)],
    "freekv": [(lambda: FreeKVReader(0.8, num_rows=9), freekv_scores)],
}
CASES = [
    pytest.param(make, scores, id=f"{name}-{at}")
    for name, cases in READER_ORACLES.items()
    for at, (make, scores) in enumerate(cases)
]


def test_every_sparse_reader_has_an_oracle():
    assert set(READER_ORACLES) == set(READERS) - {"dense"}


@pytest.mark.parametrize("num_read", [2, 3, 7, 40])
@pytest.mark.parametrize("page_size", [2, 4, 16])
@pytest.mark.parametrize(("make", "scores"), CASES)
def test_reads_what_the_reference_reads(make, scores, page_size, num_read):
    generator = torch.Generator().manual_seed(page_size)
    keys = random_keys(generator)
    q_BKGD = 2 * torch.randn(len(keys), HEADS, GROUP, DIM, generator=generator)
    query = page_query([4, 0, 7], q_BKGD, keys, page_size)
    check(make().score(query), per_head(scores, q_BKGD, keys, page_size), num_read)


@pytest.mark.parametrize("threshold", [-1.0, 0.8, 0.95, 1.0])
def test_freekv_reads_what_the_reference_reads_step_by_step(threshold):
    """Queries drift, some faster than others, so that some heads are corrected and some are not; every step appends."""
    generator = torch.Generator().manual_seed(0)
    keys, reader, previous = random_keys(generator), FreeKVReader(threshold, num_rows=9), None
    q_BKGD = 2 * torch.randn(len(keys), HEADS, GROUP, DIM, generator=generator)
    drift_BK11 = torch.tensor([[0.1, 0.5], [1.0, 0.2], [0.6, 0.0]])[:, :, None, None]
    num_corrected = 0
    for _ in range(6):
        query = page_query([4, 0, 7], q_BKGD, keys, 4)
        asked = q_BKGD.clone()
        for at in range(len(keys)):
            for head in range(HEADS):
                before = None if previous is None else previous[at, head].tolist()
                asked[at, head] = torch.tensor(freekv.asked_by(q_BKGD[at, head].tolist(), before, threshold))
        num_corrected += 0 if previous is None else int((asked == q_BKGD).all(dim=(2, 3)).sum())
        check(reader.score(query), per_head(freekv_scores, asked, keys, 4), 5)
        previous = q_BKGD
        q_BKGD = q_BKGD + drift_BK11 * 2 * torch.randn(q_BKGD.shape, generator=generator)
        keys = [[torch.cat([k_SD, torch.randn(1, DIM, generator=generator)]) for k_SD in row] for row in keys]
    # One head never moves, so its choice is the same either way.
    assert num_corrected == {-1.0: 5, 1.0: 30}.get(threshold, num_corrected)
    assert 5 <= num_corrected <= 30


def kept_of_prompt(length, num_prompt, sinks, generator):
    """Some tokens of a prompt, ascending, its first ones among them."""
    others = torch.randperm(num_prompt - sinks, generator=generator)[: length - sinks] + sinks
    return [*range(sinks), *others.sort().values.tolist()]


def store(slots, slot, token):
    if slot == -1:
        slots.append(token)
    else:
        slots[slot] = token


def attention_by_slot(q_HD, k_KSD, slots):
    """What `evict` makes of one decode step's query and stored keys: [K, X]."""
    num_slots = max(map(len, slots))
    k_KXD = torch.full((HEADS, num_slots, DIM), 7.0)
    for head, tokens in enumerate(slots):
        k_KXD[head, : len(tokens)] = k_KSD[head, tokens]
    return replay(q_HD[None], k_KXD[None], torch.tensor([[len(tokens) for tokens in slots]]), SCALE)[0]


@pytest.mark.parametrize("recent", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("capacity", [0, 16])
def test_h2o_drops_what_the_reference_drops(capacity, sinks, recent):
    """One head is full when the prompt arrives, whatever the capacity; the other may grow to 16 or not at all."""
    generator = torch.Generator().manual_seed(0)
    num_prompt, num_steps = 30, 25
    slots = [kept_of_prompt(length, num_prompt, sinks, generator) for length in (18, 11)]
    masses = [torch.rand(len(tokens), generator=generator) for tokens in slots]
    k_KSD = torch.randn(HEADS, num_prompt + num_steps, DIM, generator=generator)
    q_THD = 3 * torch.randn(num_steps, HEADS * GROUP, DIM, generator=generator)
    expected = []
    for head, tokens in enumerate(slots):
        budget, seen = max(len(tokens), capacity), dict(zip(tokens, masses[head].tolist(), strict=True))
        queries, safe = q_THD[:, head * GROUP : (head + 1) * GROUP].tolist(), h2o.Safe(sinks, int(recent * budget))
        expected.append(h2o.decode(seen, k_KSD[head].tolist(), queries, SCALE, budget=budget, safe=safe))

    spec = PackSpec("h2o", 20, sinks=sinks, params=(("evict", 1.0), ("recent", recent)))
    arrived = Arrived(1, [len(tokens) for tokens in slots], torch.cat(masses))
    hitters = HeavyHitters(spec, [arrived], capacity=capacity, num_layers=2)
    for step, q_HD in enumerate(q_THD):
        for tokens, slot in zip(slots, hitters.place_next()[1].tolist(), strict=True):
            store(tokens, slot, num_prompt + step)
        assert [sorted(tokens) for tokens in slots] == [steps[step] for steps in expected]
        hitters.add(1, attention_by_slot(q_HD, k_KSD, slots))
