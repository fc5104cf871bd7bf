"""Who is on a prefill worker: in order, as far as blocks and the step last, and back out with the books balanced."""

from __future__ import annotations

import pytest

from packlight.core.hashing import page_hashes
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.prefill.blocks import Blocks
from packlight.prefill.outbox import Outbox
from packlight.prefill.roster import Roster
from packlight.prefill.task import Stage, Task

PAGE = 4
PLENTY = 1000


class House:
    """A roster over `num_blocks` blocks."""

    def __init__(self, num_blocks: int = 64, max_running: int = 8) -> None:
        self.blocks = Blocks(num_blocks, PAGE)
        self.roster = Roster(self.blocks, max_running=max_running)

    def ask(self, first: int, num_tokens: int = 16) -> Task:
        """A prompt that shares nothing with those of another `first`."""
        tokens = tuple(range(first, first + num_tokens))
        request = PrefillRequest(str(first), tokens, num_tokens, SamplingParams(), PackSpec())
        hashes = page_hashes(tokens, PAGE, fingerprint="f", salt="")
        task = Task(request, hashes, Outbox(), arrived_s=0.0, transport="inproc", window=1)
        self.roster.queue.append(task)
        return task

    def check(self) -> None:
        self.blocks.check(self.roster.admitted)


async def test_the_oldest_begin_as_far_as_blocks_last():
    house = House(num_blocks=9)
    first, second, third = (house.ask(at) for at in (100, 200, 300))
    assert house.roster.admit(PLENTY) == [first, second]
    assert (first.stage, third.stage) == (Stage.PREFILLING, Stage.QUEUED)
    house.check()
    house.roster.retire(first)
    assert house.roster.admit(PLENTY) == [third], "idle cached blocks give way"
    house.check()


async def test_whoever_has_to_wait_costs_the_cache_nothing():
    house = House(num_blocks=9)
    idle, running, too_large = house.ask(100), house.ask(200), house.ask(300, 32)
    assert house.roster.admit(PLENTY) == [idle, running]
    idle.num_done = 16
    house.roster.retire(idle)
    assert house.roster.admit(PLENTY) == []
    assert len(house.blocks.cache.match(idle.hashes)) == 4
    house.check()
    house.roster.leave(too_large)
    again = house.ask(100, 20)
    assert house.roster.admit(PLENTY) == [again]
    assert again.num_cached == 16


@pytest.mark.parametrize(("room", "num_begun"), [(0, 0), (1, 1), (16, 1), (17, 2), (33, 3)])
async def test_nobody_begins_without_room_in_the_step(room, num_begun):
    house = House()
    for at in (100, 200, 300):
        house.ask(at)
    assert len(house.roster.admit(room)) == num_begun
    assert len(house.roster.admit(room)) == 0, "those that began fill the step"


async def test_a_prefix_that_is_being_computed_is_waited_for():
    house = House()
    first, second = house.ask(100), house.ask(100, 20)
    assert house.roster.admit(PLENTY) == [first]
    first.num_done = 16
    house.roster.retire(first)
    assert house.roster.admit(PLENTY) == [second]
    assert second.num_cached == 16
    house.check()


async def test_slow_readers_hold_up_who_comes_next():
    house = House(max_running=1)
    first, second = house.ask(100), house.ask(200)
    house.roster.admit(PLENTY)
    house.roster.retire(first)
    assert (house.roster.num_running, house.roster.admit(PLENTY)) == (1, [])
    house.roster.leave(first)
    assert house.roster.admit(PLENTY) == [second]


async def test_whoever_leaves_while_it_is_computed_goes_between_steps():
    house = House()
    task = house.ask(100)
    house.roster.admit(PLENTY)
    house.roster.leave(task)
    assert (task.stage, task.cancelled) == (Stage.PREFILLING, True)
    assert house.roster.uncomputed == [task]
    house.roster.drop_cancelled()
    assert (task.stage, house.roster.num_unfinished) == (Stage.CLOSED, 0)
    house.blocks.check_idle()


async def test_whoever_leaves_the_queue_held_nothing():
    house = House()
    task = house.ask(100)
    house.roster.leave(task)
    assert (task.stage, house.roster.num_unfinished) == (Stage.CLOSED, 0)
    house.blocks.check_idle()
