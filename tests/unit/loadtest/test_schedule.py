"""Arrivals: as many as the rate says, where it says, the same for the same seed."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.scenario import Burst, Ramp, Steady
from loadtest.schedule import Stretch, due_times, stretches

RATES = st.floats(0.01, 50)


def times(arrivals, duration_s: float, seed: str = "0") -> list[float]:
    return due_times(stretches(arrivals, duration_s), arrivals.process, seed)


def test_constant_arrivals_are_evenly_apart():
    assert times(Steady(kind="steady", rate_per_s=4, process="constant"), 2) == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_poisson_gaps_are_exponential():
    due_s = times(Steady(kind="steady", rate_per_s=5), 2000)
    gaps = [after - before for before, after in pairwise(due_s)]
    assert len(due_s) == pytest.approx(10_000, rel=0.05)
    assert mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.05)


def test_the_same_seed_gives_the_same_arrivals():
    arrivals = Steady(kind="steady", rate_per_s=5)
    assert times(arrivals, 10) == times(arrivals, 10)
    assert times(arrivals, 10) != times(arrivals, 10, "1")


def test_a_ramp_brings_three_quarters_in_its_second_half():
    due_s = times(Ramp(kind="ramp", from_per_s=0, to_per_s=10, process="constant"), 20)
    assert len(due_s) == 100
    assert sum(at < 10 for at in due_s) == 25


def test_a_ramp_may_fall():
    due_s = times(Ramp(kind="ramp", from_per_s=10, to_per_s=0, process="constant"), 20)
    assert len(due_s) == 100
    assert sum(at < 10 for at in due_s) == 75


def test_bursts_come_at_the_end_of_each_period():
    arrivals = Burst(kind="burst", rate_per_s=0, burst_per_s=10, every_s=5, burst_s=1, process="constant")
    due_s = times(arrivals, 12)
    assert len(due_s) == 20
    assert all(at % 5 >= 4 for at in due_s)


def test_a_run_that_ends_in_a_burst_cuts_it():
    arrivals = Burst(kind="burst", rate_per_s=1, burst_per_s=10, every_s=5, burst_s=2)
    assert stretches(arrivals, 9) == [Stretch(3, 1, 1), Stretch(2, 10, 10), Stretch(3, 1, 1), Stretch(1, 10, 10)]


@given(from_per_s=RATES, to_per_s=RATES, duration_s=st.floats(0.1, 100), part=st.floats(0, 1))
def test_a_stretch_says_when_so_many_are_expected(from_per_s, to_per_s, duration_s, part):
    """The integral of the rate up to that moment is that number."""
    stretch = Stretch(duration_s, from_per_s, to_per_s)
    num = part * stretch.num_expected
    at = stretch.when(num)
    assert 0 <= at <= duration_s * (1 + 1e-9)
    rate_then = from_per_s + (to_per_s - from_per_s) * at / duration_s
    assert at * (from_per_s + rate_then) / 2 == pytest.approx(num, rel=1e-6, abs=1e-9)


@given(from_per_s=RATES, to_per_s=RATES, seed=st.integers())
def test_arrivals_ascend_within_the_run(from_per_s, to_per_s, seed):
    due_s = times(Ramp(kind="ramp", from_per_s=from_per_s, to_per_s=to_per_s), 3, str(seed))
    assert due_s == sorted(due_s)
    assert all(0 <= at < 3 for at in due_s)
