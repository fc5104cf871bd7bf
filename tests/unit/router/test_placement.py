"""Where requests go: small tables, and properties that hold for every fleet."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from packlight.core.errors import NoWorker
from packlight.core.types import Role, WorkerInfo, WorkerLoad
from packlight.router.placement import (
    Demand,
    Outlook,
    cached_tokens,
    decode_cost,
    place,
    predict_ttft_s,
)

PAGE = 16
DEMAND = Demand(num_tokens=1000, shipped_bytes=1_000_000, num_pages=50)
NOTHING_KNOWN = Outlook({}, {}, {})
IDLE = WorkerLoad(num_free_pages=1000, num_total_pages=1000, tokens_per_s=1000.0, ship_bytes_per_s=1e9)


def worker(role: Role, name: str, load: WorkerLoad = IDLE, **fields) -> WorkerInfo:
    facts = {"generation": 1, "address": f"{name}:1", "model": "m", "fingerprint": "f", "compatibility": "c", **fields}
    return WorkerInfo(worker_id=name, role=role, page_size=PAGE, load=load, **facts)


def prefill(name: str = "p0", **fields) -> WorkerInfo:
    return worker(Role.PREFILL, name, replace(IDLE, **fields.pop("load", {})), **fields)


def decode(name: str = "d0", **fields) -> WorkerInfo:
    return worker(Role.DECODE, name, replace(IDLE, **fields.pop("load", {})), **fields)


def choose(workers, outlook=NOTHING_KNOWN, *, avoid=(), seed=0, demand=DEMAND):
    pair = place(workers, demand, outlook, avoid=frozenset(avoid), random=Random(seed))
    return pair.prefill.worker_id, pair.decode.worker_id


# ── which prefill worker ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("p0", "p1", "outlook", "best"),
    [
        ({}, {}, Outlook({"p1": 20}, {}, {}), "p1"),
        ({}, {}, Outlook({"p0": 10, "p1": 20}, {}, {}), "p1"),
        ({"num_queued_tokens": 500}, {}, NOTHING_KNOWN, "p1"),
        ({}, {}, Outlook({}, {"p0": 500}, {}), "p1"),  # what we sent it, and it has not reported yet
        ({"tokens_per_s": 500.0}, {}, NOTHING_KNOWN, "p1"),
        ({"ship_bytes_per_s": 1e6}, {}, NOTHING_KNOWN, "p1"),
        (
            {"num_queued_tokens": 500},
            {},
            Outlook({"p0": 20}, {}, {}),
            "p1",
        ),  # 320 cached, but 500 wait: 1180 against 1000
        (
            {"num_queued_tokens": 200},
            {},
            Outlook({"p0": 40}, {}, {}),
            "p0",
        ),  # 640 cached, and 200 wait: 560 against 1000
        ({"tokens_per_s": 0.0}, {"tokens_per_s": 500.0}, NOTHING_KNOWN, "p0"),  # 1000 are assumed
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_soonest_first_token_wins(p0, p1, outlook, best, seed):
    workers = [prefill("p0", load=p0), prefill("p1", load=p1), decode()]
    assert choose(workers, outlook, seed=seed)[0] == best
    assert choose(workers[::-1], outlook, seed=seed)[0] == best


def test_the_prediction_adds_up():
    one = prefill(load={"num_queued_tokens": 300, "tokens_per_s": 2000.0, "ship_bytes_per_s": 1e7})
    outlook = Outlook({"p0": 25}, {"p0": 100}, {})
    assert predict_ttft_s(one, DEMAND, outlook) == pytest.approx((300 + 1000 - 400) / 2000 + 0.1)
    pair = place([one, decode()], DEMAND, outlook, avoid=frozenset(), random=Random(0))
    assert (pair.num_cached_tokens, pair.ttft_s) == (400, predict_ttft_s(one, DEMAND, outlook))


def test_a_match_longer_than_the_prompt_counts_as_the_prompt():
    assert cached_tokens(prefill(), Demand(100, 0, 0), Outlook({"p0": 1000}, {}, {})) == 100


def test_of_near_ties_the_longest_prefix_wins():
    """A fast worker prefills 320 tokens in less time than anybody notices: still the prefix should stay where it is."""
    workers = [prefill(name, load={"tokens_per_s": 1e6}) for name in ("p0", "p1", "p2")] + [decode()]
    for seed in range(10):
        assert choose(workers, Outlook({"p1": 20, "p2": 3}, {}, {}), seed=seed)[0] == "p1"


# ── which decode worker ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("d0", "d1", "outlook", "best"),
    [
        ({"num_running": 3}, {}, NOTHING_KNOWN, "d1"),
        ({"num_queued": 1}, {}, NOTHING_KNOWN, "d1"),
        ({"num_running": 3}, {"num_running": 2}, NOTHING_KNOWN, "d1"),
        ({}, {}, Outlook({}, {}, {"d0": 1}), "d1"),
        ({"num_running": 1}, {}, Outlook({}, {}, {"d1": 3}), "d0"),
        ({"num_free_pages": 400}, {"num_free_pages": 900}, NOTHING_KNOWN, "d1"),
        ({"num_free_pages": 49}, {"num_running": 20}, NOTHING_KNOWN, "d1"),  # the request would have to wait for pages
        ({"num_free_pages": 50}, {"num_running": 20}, NOTHING_KNOWN, "d0"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_decode_worker_with_room_wins(d0, d1, outlook, best, seed):
    workers = [prefill(), decode("d0", load=d0), decode("d1", load=d1)]
    assert choose(workers, outlook, seed=seed)[1] == best
    assert choose(workers[::-1], outlook, seed=seed)[1] == best


def test_a_decode_worker_that_reports_no_pages_at_all():
    assert decode_cost(decode(load={"num_free_pages": 0, "num_total_pages": 0}), DEMAND, NOTHING_KNOWN) > 100


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_equals_share_the_load():
    workers = [prefill(f"p{n}") for n in range(3)] + [decode(f"d{n}") for n in range(3)]
    random, prefills, decodes = Random(7), Counter(), Counter()
    for _ in range(300):
        pair = place(workers, DEMAND, NOTHING_KNOWN, avoid=frozenset(), random=random)
        prefills[pair.prefill.worker_id] += 1
        decodes[pair.decode.worker_id] += 1
    assert min(prefills.values()) > 70
    assert min(decodes.values()) > 70
    assert len(prefills) == len(decodes) == 3


@pytest.mark.parametrize(("num_queued_tokens", "shares"), [(90, True), (200, False)])
def test_what_is_a_near_tie(num_queued_tokens, shares):
    """Within a tenth of the best, chance decides; beyond it, the better one is always taken."""
    workers = [prefill("p0"), prefill("p1", load={"num_queued_tokens": num_queued_tokens}), decode()]
    taken = {choose(workers, seed=seed)[0] for seed in range(40)}
    assert taken == ({"p0", "p1"} if shares else {"p0"})


def test_the_same_seed_makes_the_same_choice():
    workers = [prefill(f"p{n}") for n in range(5)] + [decode(f"d{n}") for n in range(5)]
    assert choose(workers, seed=3) == choose(workers, seed=3)


# ── who may not be chosen ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([], "no live prefill and no live decode worker"),
        ([prefill()], "no live decode worker"),
        ([decode()], "no live prefill worker"),
        ([prefill(draining=True), decode()], "no live prefill worker"),
        (
            [prefill(compatibility="old"), decode(), decode("d1")],
            "none of 1 prefill and 2 decode workers run compatible",
        ),
    ],
)
def test_what_is_missing_is_said(workers, message):
    with pytest.raises(NoWorker, match=message) as missing:
        choose(workers)
    assert missing.value.retry_after_s == 1.0


def test_a_rolling_upgrade_pairs_like_with_like():
    """The idle prefill worker is of a release that no decode worker runs."""
    busy = {"num_queued_tokens": 5000}
    workers = [
        prefill("new", compatibility="2"),
        prefill("old", load=busy, compatibility="1"),
        decode(compatibility="1"),
    ]
    assert choose(workers) == ("old", "d0")


NAMES = [f"w{number}" for number in range(8)]
counts = st.integers(0, 2000)
loads = st.builds(
    WorkerLoad,
    num_running=st.integers(0, 20),
    num_queued=st.integers(0, 20),
    num_queued_tokens=counts,
    num_free_pages=counts,
    num_total_pages=st.just(2000),
    tokens_per_s=st.sampled_from([0.0, 100.0, 1e4, 1e6]),
    ship_bytes_per_s=st.sampled_from([0.0, 1e6, 1e9]),
)


@st.composite
def fleets(draw) -> list[WorkerInfo]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8))
    return [
        worker(
            draw(st.sampled_from(Role)),
            name,
            draw(loads),
            draining=draw(st.booleans()),
            compatibility=draw(st.sampled_from(["1", "2"])),
        )
        for name in names
    ]


outlooks = st.builds(
    Outlook, *(st.dictionaries(st.sampled_from(NAMES), st.integers(0, top), max_size=8) for top in (100, 5000, 30))
)
demands = st.builds(Demand, st.integers(1, 2000), st.integers(0, 10**8), st.integers(0, 2500))


# A fleet takes long to draw on a busy machine, and some have no pair.
unhurried = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], deadline=None)


@unhurried
@given(workers=fleets(), outlook=outlooks, demand=demands, avoid=st.frozensets(st.sampled_from(NAMES)), seed=counts)
def test_a_pair_is_usable_or_there_is_none(workers, outlook, demand, avoid, seed):
    usable = [one for one in workers if not one.draining and one.worker_id not in avoid]
    pairs = {
        (one.worker_id, other.worker_id)
        for one in usable
        for other in usable
        if (one.role, other.role) == (Role.PREFILL, Role.DECODE) and one.compatibility == other.compatibility
    }
    try:
        pair = place(workers, demand, outlook, avoid=avoid, random=Random(seed))
    except NoWorker:
        assert not pairs
        return
    assert (pair.prefill.worker_id, pair.decode.worker_id) in pairs
    assert 0 <= pair.num_cached_tokens <= demand.num_tokens
    assert pair.ttft_s == predict_ttft_s(pair.prefill, demand, outlook) >= 0


@unhurried
@given(workers=fleets(), outlook=outlooks, demand=demands, seed=counts)
def test_nobody_much_better_is_passed_over(workers, outlook, demand, seed):
    try:
        pair = place(workers, demand, outlook, avoid=frozenset(), random=Random(seed))
    except NoWorker:
        assume(False)
    able = [one for one in workers if not one.draining and one.compatibility == pair.prefill.compatibility]
    for other in able:
        if other.role is Role.PREFILL:
            assert pair.ttft_s <= predict_ttft_s(other, demand, outlook) * 1.1 + 0.005
        else:
            cost = decode_cost(pair.decode, demand, outlook)
            assert cost <= decode_cost(other, demand, outlook) * 1.1 + 0.005


@unhurried
@given(workers=fleets(), outlook=outlooks, demand=demands, seed=counts, data=st.data())
def test_only_a_longer_prefix_draws_a_request_away_from_one_that_grew(workers, outlook, demand, seed, data):
    try:
        pair = place(workers, demand, outlook, avoid=frozenset(), random=Random(seed))
    except NoWorker:
        assume(False)
    name = pair.prefill.worker_id
    more = outlook.matched_pages.get(name, 0) + data.draw(st.integers(1, 50))
    better = replace(outlook, matched_pages={**outlook.matched_pages, name: more})
    again = place(workers, demand, better, avoid=frozenset(), random=Random(seed)).prefill
    assert cached_tokens(again, demand, better) >= cached_tokens(pair.prefill, demand, better)
