from __future__ import annotations

import asyncio

import pytest

from packlight.core.errors import Draining, QueueFull
from packlight.router.limits import Gate


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_slots_are_counted_and_given_back() -> None:
    gate = Gate(3)
    with gate.enter() as slot:
        slot.grow(3)
        assert gate.num_inside == 3
        with pytest.raises(QueueFull):
            gate.enter()
    assert gate.num_inside == 0


def test_growing_too_far_keeps_what_was_held() -> None:
    gate = Gate(3)
    with gate.enter() as slot, gate.enter():
        with pytest.raises(QueueFull):
            slot.grow(3)
        assert gate.num_inside == 2
    assert gate.num_inside == 0


def test_retry_after_follows_the_rate_at_which_requests_leave() -> None:
    clock = Clock()
    gate = Gate(4, clock=clock)
    for _ in range(60):
        slots = [gate.enter() for _ in range(4)]
        clock.now += 8.0
        for slot in slots:
            slot.__exit__()
    slots = [gate.enter() for _ in range(4)]
    with pytest.raises(QueueFull) as caught:
        gate.enter()
    # Four requests that stay 8 s each: one leaves every 2 s.
    assert caught.value.retry_after_s == pytest.approx(2.0, rel=0.01)


def test_retry_after_has_bounds() -> None:
    clock = Clock()
    gate = Gate(1, clock=clock)
    for _ in range(60):
        with gate.enter():
            pass
    assert gate.retry_after_s() == 0.1
    for _ in range(60):
        with gate.enter():
            clock.now += 1000
    assert gate.retry_after_s() == 30.0


async def test_draining() -> None:
    gate = Gate(2)
    await gate.drained()
    with gate.enter():
        gate.drain()
        with pytest.raises(Draining):
            gate.enter()
        waiting = asyncio.create_task(gate.drained())
        await asyncio.sleep(0)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 60)
