from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from packlight.core.workers import Role, WorkerInfo
from packlight.fleet.base import FleetAway, Sighting
from packlight.fleet.memory import MemoryFleet
from packlight.fleet.view import FleetView
from tests.support.clock import FakeClock
from tests.support.waiting import eventually

TTL_S = 5.0
P0 = WorkerInfo("p0", 1, Role.PREFILL, "10.0.0.1:7000", "smol", "fp", "compat")
P1 = replace(P0, worker_id="p1", address="10.0.0.2:7000")
D0 = replace(P0, worker_id="d0", role=Role.DECODE)


class UnreliableFleet(MemoryFleet):
    """A registry that can be away."""

    is_away = False

    async def list(self) -> tuple[Sighting, ...]:
        if self.is_away:
            raise FleetAway("the registry is away")
        return await super().list()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def fleet(clock: FakeClock) -> UnreliableFleet:
    fleet = UnreliableFleet(TTL_S, clock)
    for worker in (P0, P1, D0):
        await fleet.heartbeat(worker)
    return fleet


@pytest.fixture
def vanished() -> list[WorkerInfo]:
    return []


@pytest.fixture
async def view(fleet: UnreliableFleet, clock: FakeClock, vanished: list[WorkerInfo]) -> AsyncIterator[FleetView]:
    async def note(worker: WorkerInfo) -> None:
        vanished.append(worker)

    view = FleetView(fleet, poll_s=0.01, suspect_s=3.0, clock=clock, on_vanished=note)
    yield view
    await view.close()


async def test_knows_nobody_before_the_first_poll(view: FleetView) -> None:
    assert view.workers() == ()
    assert not view.available
    await view.refresh()
    assert view.available
    assert view.workers(Role.PREFILL) == (P0, P1)
    assert view.workers(Role.DECODE) == (D0,)
    assert view.workers() == (D0, P0, P1)


async def test_keeps_what_it_knows_while_the_registry_is_away(
    view: FleetView, fleet: UnreliableFleet, clock: FakeClock, vanished: list[WorkerInfo]
) -> None:
    await view.refresh()
    fleet.is_away = True
    clock.advance(1000)
    await view.refresh()
    assert not view.available
    assert view.workers(Role.PREFILL) == (P0, P1)
    assert vanished == []
    fleet.is_away = False
    await fleet.heartbeat(P1)
    await view.refresh()
    assert view.available
    assert view.workers() == (P1,)
    assert vanished == [D0, P0]


async def test_tells_who_vanished_once(view: FleetView, fleet: UnreliableFleet, vanished: list[WorkerInfo]) -> None:
    await view.refresh()
    assert vanished == []
    await fleet.leave("p0", 1)
    await view.refresh()
    await view.refresh()
    assert vanished == [P0]


async def test_a_restarted_worker_is_one_that_vanished_and_one_that_came(
    view: FleetView, fleet: UnreliableFleet, vanished: list[WorkerInfo]
) -> None:
    await view.refresh()
    reborn = replace(P0, generation=2)
    await fleet.heartbeat(reborn)
    await view.refresh()
    assert vanished == [P0]
    assert view.workers(Role.PREFILL) == (reborn, P1)


async def test_a_suspect_is_left_out_for_a_while(view: FleetView, clock: FakeClock) -> None:
    await view.refresh()
    view.suspect("p0", 1)
    assert view.workers(Role.PREFILL) == (P1,)
    clock.advance(2.9)
    await view.refresh()
    assert view.workers(Role.PREFILL) == (P1,), "listing it again with the same heartbeat proves nothing"
    clock.advance(0.1)
    assert view.workers(Role.PREFILL) == (P0, P1)


async def test_suspects_are_tried_when_nobody_else_is_left(view: FleetView, fleet: UnreliableFleet) -> None:
    await view.refresh()
    view.suspect("p0", 1)
    view.suspect("p1", 1)
    assert view.workers(Role.PREFILL) == (P0, P1)
    assert view.workers(Role.DECODE) == (D0,)
    draining = replace(P1, worker_id="p2", draining=True)
    await fleet.heartbeat(draining)
    await view.refresh()
    assert view.workers(Role.PREFILL) == (P0, P1, draining), "one that drains takes nothing new"


async def test_a_later_heartbeat_clears_a_suspicion(view: FleetView, fleet: UnreliableFleet, clock: FakeClock) -> None:
    await view.refresh()
    clock.advance(0.5)
    view.suspect("p0", 1)
    clock.advance(0.5)
    await fleet.heartbeat(P0)
    assert view.workers(Role.PREFILL) == (P1,)
    await view.refresh()
    assert view.workers(Role.PREFILL) == (P0, P1)


async def test_a_heartbeat_sent_before_the_failure_does_not(
    view: FleetView, fleet: UnreliableFleet, clock: FakeClock
) -> None:
    await view.refresh()
    await fleet.heartbeat(P0)
    clock.advance(0.5)
    view.suspect("p0", 1)
    await view.refresh()
    assert view.workers(Role.PREFILL) == (P1,)


async def test_a_restart_clears_a_suspicion(view: FleetView, fleet: UnreliableFleet) -> None:
    await view.refresh()
    view.suspect("p0", 1)
    reborn = replace(P0, generation=2)
    await fleet.heartbeat(reborn)
    await view.refresh()
    assert view.workers(Role.PREFILL) == (reborn, P1)
    view.suspect("p0", 1)
    assert view.workers(Role.PREFILL) == (reborn, P1), "the failure was the life before's"


async def test_polls_until_closed(view: FleetView, fleet: UnreliableFleet) -> None:
    await view.start()
    assert len(view.workers()) == 3
    await fleet.leave("d0", 1)
    await eventually(lambda: len(view.workers()) == 2)
    fleet.is_away = True
    await eventually(lambda: not view.available)
    fleet.is_away = False
    await eventually(lambda: view.available)
    await view.close()
    await view.close()
