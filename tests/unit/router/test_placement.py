"""Where requests go: small tables, and properties that hold for every fleet."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from packlight.core.errors import NoWorker
from packlight.core.workers import LocalPrefill, Role, WorkerInfo, WorkerLoad
from packlight.router.beliefs import as_believed, prefilling
from packlight.router.placement import (
    ASSUMED_ARRIVALS_PER_S,
    HOP_S,
    Costs,
    Demand,
    Option,
    Outlook,
    Reason,
    cached_tokens,
    decode_cost,
    place,
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


def offering(name: str = "d0", *, max_tokens: int = 10_000, max_stall_s: float = 0.2, local=(), **fields) -> WorkerInfo:
    """A decode worker that prefills; `local` is the load of that."""
    offer = LocalPrefill(f"{name}/prefill", max_tokens, max_stall_s, replace(IDLE, **dict(local)))
    return replace(decode(name, **fields), local_prefill=offer)


def option_of(one: WorkerInfo) -> Option:
    """The worker as `place` weighs it: a prefill worker, or what a decode worker prefills itself."""
    local = one.local_prefill
    if local is None:
        return Option(one, [decode()])
    return Option(replace(one, worker_id=local.worker_id, role=Role.PREFILL, load=local.load), [one], local)


def pair_of(workers, outlook=NOTHING_KNOWN, *, avoid=(), seed=0, demand=DEMAND):
    return place(workers, demand, outlook, avoid=frozenset(avoid), random=Random(seed))


def choose(workers, outlook=NOTHING_KNOWN, **how):
    pair = pair_of(workers, outlook, **how)
    return pair.prefill.worker_id, pair.decode.worker_id


def prompt(num_tokens: int) -> Demand:
    """Of exact KV of SmolLM2's shape in bf16."""
    return Demand(num_tokens, shipped_bytes=23_040 * num_tokens, num_pages=50)


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
    pair = pair_of([one, decode()], outlook)
    assert pair.num_cached_tokens == 400
    assert pair.ttft_s == pytest.approx((300 + 1000 - 400) / 2000 + HOP_S + 0.1)


def test_what_a_step_costs_whatever_its_size_counts_once():
    one = prefill(load={"fixed_s": 0.05})
    assert pair_of([one, decode()], demand=Demand(1000, 0, 0)).ttft_s == pytest.approx(0.05 + 1.0 + HOP_S)


def test_who_has_not_measured_is_believed_to_be_as_fast_as_the_fastest():
    """Otherwise it would never be asked, and so never measure."""
    workers = [prefill("p0", load={"tokens_per_s": 0.0}), prefill("p1", load={"tokens_per_s": 1e5}), decode()]
    assert {choose(workers, seed=seed)[0] for seed in range(40)} == {"p0", "p1"}


def slow_once(**load) -> list[WorkerInfo]:
    """Of two workers of a kind, one that a pause made look a hundred times slower."""
    return [
        prefill("p0"),
        prefill("p1", load={"tokens_per_s": 10.0, "fixed_s": 1.0, "ship_bytes_per_s": 1e5} | load),
        decode(),
    ]


def test_who_was_slow_once_is_asked_again():
    """Otherwise it would never be asked, and so look slow for ever."""
    for seed in range(40):
        assert choose(slow_once(idle_s=0.5), seed=seed)[0] == choose(slow_once(idle_s=60.0), seed=seed)[0] == "p0"
    assert {choose(slow_once(idle_s=300.0), seed=seed)[0] for seed in range(40)} == {"p0", "p1"}


@given(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.sampled_from([1, 1000, 100_000]))
def test_the_longer_ago_it_was_slow_the_faster_it_is_believed_to_be(idle_s, more_s, num_tokens):
    """... though never faster than the fastest; and what that one is believed to be does not change."""
    fast, then, _ = as_believed(slow_once(idle_s=idle_s), num_tokens)
    later = as_believed(slow_once(idle_s=idle_s + more_s), num_tokens)[1]
    assert fast == prefill("p0")
    times = [one.load.fixed_s + num_tokens / one.load.tokens_per_s for one in (fast, later, then, slow_once()[1])]
    assert all(one <= other * 1.000001 for one, other in pairwise(times))
    ships = [one.load.ship_bytes_per_s for one in (fast, later, then, slow_once()[1])]
    assert all(one >= other * 0.999999 for one, other in pairwise(ships))


def test_idling_changes_nothing_for_the_fastest_or_where_nobody_is_faster():
    alone = [prefill("p1", load={"tokens_per_s": 10.0, "idle_s": 1e6}), decode()]
    assert as_believed(alone, 1000) == alone
    both = [prefill("p0", load={"idle_s": 1e6}), prefill("p1", load={"idle_s": 1e6, "tokens_per_s": 0.0}), decode()]
    assert as_believed(both, 1000) == both


def test_a_local_prefill_that_was_slow_is_believed_in_again():
    slow = offering(local={"tokens_per_s": 10.0, "idle_s": 300.0})
    believed = as_believed([prefill(), slow], 100)[1]
    assert believed.local_prefill.load.tokens_per_s == pytest.approx(1000, rel=0.01)
    assert believed.load == slow.load


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


SLOW, FAST = {"link_bytes_per_s": {"p0": 1e6}}, {"link_bytes_per_s": {"p0": 1e9, "p1": 1e6}}


@pytest.mark.parametrize(
    ("d0", "d1", "best"),
    [
        (SLOW, FAST, "d1"),
        (SLOW, {}, "d1"),  # not measured: believed to be like the prefill worker's others
        (SLOW, {**FAST, "num_running": 15}, "d1"),  # 1 MB over 1 MB/s is a second
        (SLOW, {**FAST, "num_running": 25}, "d0"),
        ({"link_bytes_per_s": {"p1": 1.0}}, {"num_running": 1}, "d0"),  # the link of another pair
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_measured_link_of_a_pair_counts(d0, d1, best, seed):
    workers = [prefill(), decode("d0", load=d0), decode("d1", load=d1)]
    assert choose(workers, seed=seed)[1] == best
    assert choose(workers[::-1], seed=seed)[1] == best


def test_a_pair_is_chosen_by_its_own_link():
    """Each decode worker is near one prefill worker."""
    near = [decode(f"d{n}", load={"link_bytes_per_s": {f"p{n}": 1e9, f"p{1 - n}": 1e7}}) for n in range(2)]
    workers = [prefill("p0"), prefill("p1"), *near]
    assert {choose(workers, seed=seed)[:2] for seed in range(40)} == {("p0", "d0"), ("p1", "d1")}


def test_the_prediction_is_that_of_the_chosen_pair():
    slow = decode("d0", load={"link_bytes_per_s": {"p0": 1e6}})
    assert pair_of([prefill(), slow]).ttft_s == pytest.approx(1.0 + HOP_S + 1.0)


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


# ── local or remote ──────────────────────────────────────────────────────────────────────────────────────────────────

BUSY = {"num_running": 1}


@pytest.mark.parametrize(
    ("num_tokens", "remote", "local", "running", "is_local"),
    [
        (100, {}, {}, {}, True),  # 100 ms of computing either way: the call and the shipment decide
        (7000, {}, {}, {}, False),  # long: whoever begins to decode in those 7 s would wait
        (100, {}, {}, {"num_running": 8}, False),  # 8 answers would wait 100 ms each
        (100, {"num_queued_tokens": 2000}, {}, {"num_running": 8}, True),  # ... but that is less than 2 s in a queue
        (100, {}, {"num_queued_tokens": 300}, {}, False),
        (100, {}, {"tokens_per_s": 200.0}, {}, False),
        (100, {"tokens_per_s": 200.0}, {}, {"num_running": 3}, True),
        (7000, {"tokens_per_s": 100.0}, {}, {}, True),
        (7000, {"num_queued_tokens": 50_000}, {}, {}, True),  # overloaded: better slowly than late
        (500, {"ship_bytes_per_s": 1e6}, {}, {}, True),  # 11.5 s on a slow link
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_who_prefills(num_tokens, remote, local, running, is_local, seed):
    workers = [prefill(load=remote), offering(local=local, load=running)]
    pair = pair_of(workers, demand=prompt(num_tokens), seed=seed)
    assert (pair.is_local, pair.reason) == (is_local, Reason.CHEAPER)
    assert pair.prefill.worker_id == ("d0/prefill" if is_local else "p0")
    assert pair.decode.worker_id == "d0"


def test_what_is_cached_beside_decode_need_not_be_computed():
    """The second turn of a chat goes where the first one's exact KV is, even while others decode there."""
    outlook = Outlook({"d0/prefill": 60}, {}, {})  # 960 of 1000 tokens
    workers = [prefill(), offering(load=BUSY), offering("d1", load=BUSY)]
    pair = pair_of(workers, outlook, demand=prompt(1000))
    assert (pair.prefill.worker_id, pair.decode.worker_id, pair.num_cached_tokens) == ("d0/prefill", "d0", 960)
    elsewhere = Outlook({"p0": 60}, {}, {})
    assert pair_of(workers, elsewhere, demand=prompt(1000)).prefill.worker_id == "p0"


def test_what_we_sent_counts_before_it_is_reported():
    workers = [prefill(), offering()]
    sent = Outlook({}, {"d0/prefill": 1000}, {})
    assert pair_of(workers, demand=prompt(100)).is_local
    assert not pair_of(workers, sent, demand=prompt(100)).is_local
    assert not pair_of(workers, Outlook({}, {}, {"d0": 8}), demand=prompt(100)).is_local


def test_the_stall_adds_up():
    one = offering(load={"num_running": 3, "step_s": 0.06}, local={"fixed_s": 0.04})
    costs, computing_s = Costs(prompt(460), NOTHING_KNOWN), 0.04 + 0.46
    assert costs.ttft_s(option_of(one)) == pytest.approx(computing_s + 3 * 0.06)  # 3 chunks of 0.2 s, 3 decode steps
    stall_s = computing_s * (3 + ASSUMED_ARRIVALS_PER_S * computing_s / 2)
    assert costs.of(option_of(one)) == pytest.approx(computing_s + 3 * 0.06 + stall_s)
    idle = offering(load={"step_s": 0.06})
    assert costs.ttft_s(option_of(idle)) == pytest.approx(0.46)  # nobody takes turns with it


def test_the_idle_of_two_decode_workers_prefills():
    workers = [offering("d0", load={"num_running": 4}), offering("d1")]
    for seed in range(5):
        assert choose(workers, demand=prompt(200), seed=seed) == ("d1/prefill", "d1")


def test_without_a_prefill_worker_everything_that_fits_is_prefilled_by_decode():
    pair = pair_of([offering(), decode("d1")], demand=prompt(10_000))
    assert (pair.prefill.worker_id, pair.is_local, pair.reason) == ("d0/prefill", True, Reason.ONLY)
    with pytest.raises(NoWorker, match="up to 10000 tokens themselves; the prompt has 10001: start a prefill worker"):
        choose([offering(), decode("d1")], demand=prompt(10_001))


def test_what_does_not_fit_beside_decode_goes_to_prefill():
    pair = pair_of([prefill(), offering(max_tokens=64)], demand=prompt(65))
    assert (pair.prefill.worker_id, pair.reason) == ("p0", Reason.TOO_LONG)


def test_where_nobody_offers_there_is_no_choice():
    assert pair_of([prefill(), decode()]).reason is Reason.ONLY


def test_a_full_decode_worker_is_not_chosen_for_being_near():
    workers = [prefill(), offering("d0", load={"num_free_pages": 10}), decode("d1", load=BUSY)]
    assert choose(workers, demand=prompt(100)) == ("p0", "d1")


@pytest.mark.parametrize(
    ("avoid", "expected"),
    [(["d0/prefill"], ("p0", "d0")), (["p0"], ("d0/prefill", "d0")), (["d0/prefill", "d1"], ("p0", "d0"))],
)
def test_a_local_prefill_that_failed_is_avoided_and_its_decode_worker_is_not(avoid, expected):
    workers = [prefill(), offering("d0"), decode("d1", load={"num_running": 9})]
    assert choose(workers, demand=prompt(100), avoid=avoid) == expected


def test_nobody_prefills_on_a_decode_worker_that_is_avoided_or_drains():
    assert choose([prefill(), offering(), decode("d1")], demand=prompt(100), avoid=["d0"]) == ("p0", "d1")
    assert choose([prefill(), offering(draining=True), decode("d1")], demand=prompt(100)) == ("p0", "d1")


@given(
    num_tokens=st.integers(1, 20_000),
    more=st.integers(0, 20_000),
    running=st.integers(0, 16),
    tokens_per_s=st.sampled_from([100.0, 1000.0, 20_000.0]),
)
def test_a_longer_prompt_or_more_running_answers_never_make_local_prefill_look_better(
    num_tokens, more, running, tokens_per_s
):
    """Against a prefill worker of the same speed and a shipment that takes no time."""

    def is_local(num_tokens: int, num_running: int) -> bool:
        speed = {"tokens_per_s": tokens_per_s}
        local = offering(max_tokens=10**6, local=speed, load={"num_running": num_running, "step_s": 0.05})
        costs = Costs(Demand(num_tokens, 0, 0), NOTHING_KNOWN)
        return costs.of(option_of(local)) <= costs.of(option_of(prefill(load=speed)))

    if not is_local(num_tokens, running):
        assert not is_local(num_tokens + more, running)
        assert not is_local(num_tokens, running + 1)


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
BOTH = NAMES + [f"{name}/prefill" for name in NAMES]
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
    step_s=st.sampled_from([0.0, 0.05]),
    fixed_s=st.sampled_from([0.0, 0.02]),
)


@st.composite
def fleets(draw) -> list[WorkerInfo]:
    fleet = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8)):
        role = draw(st.sampled_from(Role))
        has_local = role is Role.DECODE and draw(st.booleans())
        offer = LocalPrefill(f"{name}/prefill", draw(st.integers(1, 2000)), 0.2, draw(loads)) if has_local else None
        states = {"draining": draw(st.booleans()), "compatibility": draw(st.sampled_from(["1", "2"]))}
        fleet.append(worker(role, name, draw(loads), local_prefill=offer, **states))
    return fleet


outlooks = st.builds(
    Outlook,
    *(st.dictionaries(st.sampled_from(BOTH), st.integers(0, top), max_size=8) for top in (100, 5000, 30)),
)
demands = st.builds(Demand, st.integers(1, 2000), st.integers(0, 10**8), st.integers(0, 2500))


# A fleet takes long to draw on a busy machine, and some have no pair.
unhurried = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], deadline=None)


@unhurried
@given(workers=fleets(), outlook=outlooks, demand=demands, avoid=st.frozensets(st.sampled_from(BOTH)), seed=counts)
def test_a_pair_is_usable_or_there_is_none(workers, outlook, demand, avoid, seed):
    usable = [one for one in workers if not one.draining and one.worker_id not in avoid]
    pairs = {
        (one.worker_id, other.worker_id)
        for one in usable
        for other in usable
        if (one.role, other.role) == (Role.PREFILL, Role.DECODE) and one.compatibility == other.compatibility
    } | {
        (one.local_prefill.worker_id, one.worker_id)
        for one in usable
        if one.local_prefill
        and one.local_prefill.max_tokens >= demand.num_tokens
        and one.local_prefill.worker_id not in avoid
    }
    try:
        pair = place(workers, demand, outlook, avoid=avoid, random=Random(seed))
    except NoWorker:
        assert not pairs
        return
    assert (pair.prefill.worker_id, pair.decode.worker_id) in pairs
    assert 0 <= pair.num_cached_tokens <= demand.num_tokens
    assert pair.ttft_s >= 0
    assert pair.is_local == (pair.prefill.worker_id == f"{pair.decode.worker_id}/prefill")
    both = {name.endswith("/prefill") for name, _ in pairs}
    assert (pair.reason is Reason.CHEAPER) == (both == {True, False})


@unhurried
@given(workers=fleets(), outlook=outlooks, demand=demands, seed=counts)
def test_nobody_much_better_is_passed_over(workers, outlook, demand, seed):
    try:
        pair = place(workers, demand, outlook, avoid=frozenset(), random=Random(seed))
    except NoWorker:
        assume(False)
    alive = [one for one in workers if not one.draining]
    able = [one for one in alive if one.compatibility == pair.prefill.compatibility]
    costs = Costs(demand, outlook, max(1000.0, *(prefilling(one).tokens_per_s for one in alive)))
    mine = costs.of(option_of(pair.decode if pair.is_local else pair.prefill))
    has_room_somewhere = any(has_room(one, demand) for one in able if one.role is Role.DECODE)
    for other in able:
        offer = other.local_prefill
        is_able = offer.max_tokens >= demand.num_tokens and has_room(other, demand) if offer else has_room_somewhere
        if is_able and (offer or other.role is Role.PREFILL):
            assert mine <= costs.of(option_of(other)) * 1.1 + 0.005
        if other.role is Role.DECODE and not pair.is_local:
            cost = decode_cost(pair.decode, demand, outlook)
            assert cost <= decode_cost(other, demand, outlook) * 1.1 + 0.005


def has_room(one: WorkerInfo, demand: Demand) -> bool:
    return demand.num_pages <= one.load.num_free_pages


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
