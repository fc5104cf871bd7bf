from __future__ import annotations

import pytest

from packlight.redis_link.breaker import Breaker
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Breaker:
    return Breaker(2.0, clock)


def test_starts_closed(breaker: Breaker) -> None:
    assert not breaker.is_open
    assert breaker.allow()
    assert breaker.allow()
    assert breaker.num_heals == 0


def test_a_failure_opens_it_for_the_cooldown(breaker: Breaker, clock: FakeClock) -> None:
    breaker.fail()
    assert breaker.is_open
    clock.advance(1.999)
    assert not breaker.allow()
    clock.advance(0.001)
    assert breaker.allow()


def test_one_probe_at_a_time(breaker: Breaker, clock: FakeClock) -> None:
    breaker.fail()
    clock.advance(2.0)
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.abandon()
    assert [breaker.allow(), breaker.allow()] == [True, False]
    assert breaker.is_open


def test_a_successful_probe_closes_it(breaker: Breaker, clock: FakeClock) -> None:
    breaker.fail()
    clock.advance(2.0)
    assert breaker.allow()
    breaker.succeed()
    assert not breaker.is_open
    assert breaker.allow()
    assert breaker.num_heals == 1
    breaker.succeed()
    assert breaker.num_heals == 1


@pytest.mark.parametrize("outcome", [Breaker.fail, Breaker.strike])
def test_a_failed_probe_opens_it_again(breaker: Breaker, clock: FakeClock, outcome) -> None:
    breaker.fail()
    clock.advance(2.0)
    assert breaker.allow()
    outcome(breaker)
    assert not breaker.allow()
    clock.advance(2.0)
    assert breaker.allow()


def test_one_late_answer_is_chance_two_in_a_row_are_not(breaker: Breaker) -> None:
    breaker.strike()
    assert not breaker.is_open
    breaker.succeed()
    breaker.strike()
    assert not breaker.is_open
    breaker.strike()
    assert breaker.is_open
