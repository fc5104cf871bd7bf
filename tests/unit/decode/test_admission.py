"""Reservations: the books balance in any order of events, nothing is lost, and a growing request never waits."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from packlight.compress.evict import capacity
from packlight.core.errors import QueueFull, RequestNeverFits
from packlight.core.types import GenerateRequest, ModelSpec, PackSpec, SamplingParams, StopRules
from packlight.decode.admission import Needs, Reservation, Reservations

TOTAL = 40


class Books(RuleBasedStateMachine):
    """Requests come, grow, settle and leave in any order. The model: what each was promised, as plain numbers."""

    def __init__(self):
        super().__init__()
        self.pool = Reservations(TOTAL)
        self.open: list[Reservation] = []
        self.arrived: dict[Reservation, int] = {}

    @rule(bound=st.integers(0, 50))
    def come(self, bound):
        if bound > TOTAL:
            with pytest.raises(RequestNeverFits, match=f"{bound} .* has {TOTAL}"):
                Reservation(self.pool, bound)
            return
        free = self.pool.num_free
        reservation = Reservation(self.pool, bound)
        assert self.pool.num_free == free, "planning holds nothing"
        assert reservation.open() == (bound <= free)
        if reservation.num_pages == bound and bound <= free:
            self.open.append(reservation)
            self.arrived[reservation] = 0

    @precondition(lambda self: self.open)
    @rule(data=st.data(), num_pages=st.integers(0, 20))
    def arrive(self, data, num_pages):
        reservation = data.draw(st.sampled_from(self.open))
        held, free = reservation.num_pages, self.pool.num_free
        total = self.arrived[reservation] + num_pages
        if total > TOTAL:
            with pytest.raises(RequestNeverFits):
                reservation.arrive(num_pages)
        elif total - held > free:
            with pytest.raises(QueueFull, match=f"{total} .* {held} are reserved and {free} of {TOTAL}"):
                reservation.arrive(num_pages)
        else:
            reservation.arrive(num_pages)
            self.arrived[reservation] = total
            assert reservation.num_pages == max(held, total)
            return
        assert (reservation.num_pages, self.pool.num_free) == (held, free), "a refusal changes nothing"

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data):
        reservation = data.draw(st.sampled_from(self.open))
        reservation.settle()
        assert reservation.num_pages == self.arrived[reservation]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data):
        reservation = data.draw(st.sampled_from(self.open))
        self.open.remove(reservation)
        for _ in range(2):
            reservation.close()

    @invariant()
    def balance(self):
        assert self.pool.num_reserved == sum(r.num_pages for r in self.open)
        assert 0 <= self.pool.num_reserved <= TOTAL
        assert all(r.num_pages >= self.arrived[r] for r in self.open)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def model(windows=(None, None), num_heads=2):
    return ModelSpec("m", "f", len(windows), num_heads, 8, 100, 4096, (0,), "float32", windows)


def request(num_prompt, max_tokens, pack, num_resumed=0):
    tokens = (1,) * (num_prompt + num_resumed)
    return GenerateRequest("r", tokens, num_prompt, SamplingParams(), StopRules(max_tokens), pack)


def stored_lengths(arrived, num_steps, cap, is_sliding):
    """The obvious way: one token after the other."""
    lengths = list(arrived)
    for _ in range(num_steps):
        lengths = [
            n if cap is not None and not is_sliding and n >= max(a, cap) else n + 1
            for n, a in zip(lengths, arrived, strict=True)
        ]
    return lengths


@settings(max_examples=300, deadline=None)
@given(
    num_prompt=st.integers(1, 120),
    num_resumed=st.integers(0, 9),
    num_more=st.integers(1, 40),
    budget=st.integers(8, 130),
    evict=st.booleans(),
    page_size=st.sampled_from([1, 4, 16]),
    windows=st.sampled_from([(None, None), (None, 20)]),
)
def test_what_layers_really_take_is_within_the_bound(
    num_prompt, num_resumed, num_more, budget, evict, page_size, windows
):
    """Lengths at the budget's own limit, then every token of the answer, one at a time."""
    params = (("evict", float(evict)),)
    pack = PackSpec("h2o", budget_tokens=budget, window=4, sinks=2, params=params)
    spec = model(windows)
    max_tokens = num_resumed + num_more
    needs = Needs(request(num_prompt, max_tokens, pack, num_resumed), spec, page_size)
    total = 0
    for layer, window in enumerate(windows):
        kept = min(num_prompt, budget if window is None else window)
        arrived = [kept + num_resumed] * 2 if window is None else [min(num_prompt + num_resumed, window)] * 2
        cap = capacity(pack, num_prompt, max_tokens)
        final = stored_lengths(arrived, num_more, cap, is_sliding=window is not None)
        taken = needs.layer(layer, arrived)
        assert taken == sum(-(-length // page_size) for length in final)
        assert needs.evicts(layer) == (evict and window is None)
        total += taken
    assert total <= needs.bound()
    if evict and num_prompt >= budget and num_resumed == 0 and windows == (None, None):
        assert total == 4 * -(-budget // page_size), "no page for the answer"


def test_a_short_prompt_may_grow_into_its_budget_and_no_further():
    pack = PackSpec("h2o", budget_tokens=20, window=4, sinks=2, params=(("evict", 1.0),))
    needs = Needs(request(10, 100, pack), model(), 4)
    assert needs.capacity == 20
    assert needs.layer(0, [10, 10]) == 2 * 5
    assert needs.bound() == 4 * 5
    plain = PackSpec("h2o", budget_tokens=20, window=4, sinks=2)
    assert Needs(request(10, 100, plain), model(), 4).bound() == 4 * -(-110 // 4)


def test_an_evicting_resumed_answer_keeps_the_room_it_arrives_with():
    pack = PackSpec("h2o", budget_tokens=20, window=4, sinks=2, params=(("evict", 1.0),))
    needs = Needs(request(50, 100, pack, num_resumed=7), model(), 4)
    assert needs.layer(0, [27, 27]) == 2 * 7
    assert needs.bound() == 4 * 7


@given(
    num_shards=st.sampled_from([1, 2, 4]),
    recipe=st.sampled_from(["none", "snapkv", "adakv", "cake"]),
    num_prompt=st.integers(1, 200),
    max_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_what_is_free_in_all_shards_together_is_free_in_each(num_shards, recipe, num_prompt, max_tokens, data):
    """A shard's pages, times the shards, are within the layer's need; and a layer as even as the recipe makes it, or
    as uneven as its budget lets it be, within the bound."""
    spec, pack = model(num_heads=4), PackSpec(recipe, budget_tokens=50, window=4, sinks=2)
    pack = PackSpec() if recipe == "none" else pack
    needs = Needs(request(num_prompt, max_tokens, pack), spec, 4, num_shards=num_shards)
    total, kept = 0, min(num_prompt, 50 if recipe != "none" else num_prompt)
    for layer in range(spec.num_layers):
        lengths = [kept] * 4
        if recipe == "adakv" and num_prompt > 50:
            moved = data.draw(st.integers(0, min(kept - 7, num_prompt - kept)))
            lengths = [kept + moved, kept - moved, kept, kept]
        size = 4 // num_shards
        by_shard = [
            sum(-(-(length + max_tokens) // 4) for length in lengths[start : start + size])
            for start in range(0, 4, size)
        ]
        assert needs.layer(layer, lengths) == num_shards * max(by_shard)
        total += needs.layer(layer, lengths)
    assert total <= needs.bound()
