"""H2O's eviction against the obvious way: plain lists, one head and one token at a time."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from packlight.compress.evict import (
    Arrived,
    HeavyHitters,
    capacity,
    evicts,
    mass_bytes,
    replay,
    split_mass,
    with_mass,
)
from packlight.compress.recipes import RECIPES
from packlight.core.errors import ShipmentCorrupt
from packlight.core.types import PackSpec


def spec(budget=None, recent=0.5, sinks=2, recipe="h2o", evict=1.0, **kwargs):
    params = (("evict", evict), ("recent", recent))
    return PackSpec(recipe, budget_tokens=budget, sinks=sinks, window=kwargs.pop("window", 1), params=params, **kwargs)


@dataclass
class Stored:
    position: int
    mass: float


class PlainHead:
    """The tokens of one head in the order of their slots."""

    def __init__(self, masses, limit, sinks, share):
        self.slots = [Stored(position, mass) for position, mass in enumerate(masses)]
        self.limit = max(limit, len(masses))
        self.sinks, self.share, self.next = sinks, share, len(masses)

    def place_next(self):
        token = Stored(self.next, 0.0)
        self.next += 1
        if len(self.slots) < self.limit:
            self.slots.append(token)
            return -1
        num_recent = min(int(self.share * self.limit), max(0, self.limit - self.sinks - 1))
        by_age = sorted(self.slots, key=lambda stored: stored.position)
        oldest_first = [s for s in by_age if s.position >= self.sinks]
        candidates = oldest_first[: len(oldest_first) - num_recent]
        victim = min(candidates, key=lambda stored: (stored.mass, stored.position))
        slot = self.slots.index(victim)
        self.slots[slot] = token
        return slot

    def add(self, weights):
        for stored, weight in zip(self.slots, weights, strict=False):
            stored.mass += weight


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(4, 14), min_size=2, max_size=2), min_size=1, max_size=3),
    limit=st.sampled_from([0, 10, 17]),
    sinks=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    num_steps=st.integers(1, 25),
    seed=st.integers(0, 1 << 20),
)
def test_the_same_slots_as_with_plain_lists(lengths, limit, sinks, share, num_steps, seed):
    """Masses are small integers, so ties are frequent and sums exact."""
    noise = torch.Generator().manual_seed(seed)
    layers = [
        Arrived(2 * index, row, torch.randint(0, 4, (sum(row),), generator=noise).float())
        for index, row in enumerate(lengths)
    ]
    state = HeavyHitters(spec(recent=share, sinks=sinks), layers, capacity=limit, num_layers=7)
    heads = [
        [PlainHead(mass.tolist(), limit, sinks, share) for mass in arrived.mass.split(list(arrived.lengths))]
        for arrived in layers
    ]
    for _ in range(num_steps):
        placed = state.place_next()
        assert placed.shape == (7, 2)
        assert placed[0 : 2 * len(layers) : 2].tolist() == [[head.place_next() for head in row] for row in heads]
        assert (placed[1::2] == -1).all(), "layers that do not evict append"
        for index, row in enumerate(heads):
            used = max(len(head.slots) for head in row)
            weights = torch.randint(0, 3, (2, used + 3), generator=noise).float()
            for head, weights_X in zip(row, weights, strict=True):
                weights_X[len(head.slots) :] = 0
                head.add(weights_X.tolist())
            state.add(2 * index, weights)
    assert [state.watches(layer) for layer in range(3)] == [True, False, len(layers) > 1]


def test_by_hand():
    """Sinks 1, recent 2 of 5: of the tokens 1 and 2, the one with less mass goes; what is generated ages."""
    state = HeavyHitters(
        spec(sinks=1, recent=0.4), [Arrived(0, (5,), torch.tensor([9.0, 2, 3, 0, 0]))], capacity=0, num_layers=1
    )
    slots = []
    for _ in range(4):
        slots.append(int(state.place_next()))
        state.add(0, torch.tensor([[1.0, 0, 0, 0, 0]]))
    # Token 1 goes for 5 (2 has more mass, 3 and 4 are recent), then 3 for 6, 4 for 7, and 5 for 8.
    assert slots == [1, 3, 4, 1]


def test_ties_go_to_the_older_token():
    state = HeavyHitters(spec(sinks=0, recent=0.0), [Arrived(0, (3,), torch.ones(3))], capacity=0, num_layers=1)
    assert int(state.place_next()) == 0
    state.add(0, torch.ones(1, 3))
    assert int(state.place_next()) == 0, "the new token has the least mass, nobody protects it"


def test_replay_is_softmax_over_stored_tokens_summed_over_the_group():
    torch.manual_seed(3)
    q, k = torch.randn(2, 6, 8), torch.randn(2, 3, 12, 8)
    lengths = torch.tensor([[1, 5, 12], [7, 3, 2]])
    k[0, 0, 1:] = torch.nan  # what was never stored may be anything
    got = replay(q, k, lengths, scale=0.3)
    for row in range(2):
        for head in range(3):
            n = int(lengths[row, head])
            expected = sum(
                (q[row, h].double() @ k[row, head, :n].double().T * 0.3).softmax(0) for h in (2 * head, 2 * head + 1)
            )
            assert torch.allclose(got[row, head, :n].double(), expected, atol=1e-6)
            assert (got[row, head, n:] == 0).all()


def test_mass_travels_behind_the_payload():
    payload = torch.arange(11, dtype=torch.uint8)  # of no particular alignment
    mass = torch.rand(2, 6)
    indices = [torch.tensor([0, 2, 5]), torch.tensor([1, 7])]  # token 7 was generated earlier: nobody watched it
    sent = with_mass(payload, indices, mass)
    assert sent.numel() == 11 + mass_bytes(spec(40), [3, 2])
    back, got = split_mass(sent, [3, 2])
    assert torch.equal(back, payload)
    assert got.tolist() == [*mass[0, [0, 2, 5]].tolist(), mass[1, 1].item(), 0.0]
    assert split_mass(with_mass(payload, indices, None), [3, 2])[1].tolist() == [0.0] * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_mass_that_is_none_is_a_corrupt_shipment(value):
    sent = with_mass(torch.zeros(4, dtype=torch.uint8), [torch.tensor([0])], torch.tensor([[value]]))
    with pytest.raises(ShipmentCorrupt, match="mass"):
        split_mass(sent, [1])


def test_who_evicts_and_up_to_where():
    assert [name for name in RECIPES if evicts(PackSpec(name, params=(("evict", 1.0),)))] == ["h2o", "h2o_pyramid"]
    assert not any(evicts(PackSpec(name)) for name in RECIPES)
    assert mass_bytes(spec(40, evict=0.0), [3]) == 0
    assert capacity(spec(40, evict=0.0), 100, 50) is None
    assert capacity(spec(40), 100, 50) == 0
    assert capacity(spec(40), 30, 50) == 40
    assert capacity(spec(40), 30, 5) == 35, "it cannot come to more than there are tokens"
    assert capacity(spec(ratio=0.5, window=1, sinks=1), 2, 50) == 26
