"""Who is on a decode worker: in order, as far as rows and pages last, and back out with everything they held."""

from __future__ import annotations

import pytest
import torch

from packlight.core.types import ModelSpec
from packlight.decode.memory import DecodeMemory
from packlight.decode.roster import Roster
from packlight.decode.task import Stage, Task
from packlight.engine.compute import Decoding
from packlight.kv.pool import KVPool
from tests.support.fake_pair import make_request

SPEC = ModelSpec("m", "f", 2, 2, 8, 100, 512, (0,), "float32")
PAGE, PAGES_OF_ONE = 4, 2 * 2 * 3  # 8 tokens of prompt and 4 of answer


class House:
    """A roster with room for `num_requests` of the requests made here, in `num_rows` rows."""

    def __init__(self, num_requests: int, num_rows: int) -> None:
        pool = KVPool(SPEC, num_blocks=3 * num_requests, page_size=PAGE, dtype=torch.float32)
        self.memory = DecodeMemory(SPEC, pool, num_rows=num_rows)
        self.roster = Roster(self.memory)

    def ask(self, name: str) -> Task:
        request = make_request(list(range(8)), 4, request_id=name)
        task = Task(request, lambda event: None, self.memory.plan(request), arrived_s=0.0)
        self.roster.queue.append(task)
        return task

    def admit_all(self) -> list[str]:
        admitted = []
        while (task := self.roster.admit_next()) is not None:
            task.admit(0.0)
            admitted.append(task.request.request_id)
        return admitted

    def check(self) -> None:
        self.memory.check([task.holding for task in self.roster.admitted])


@pytest.mark.parametrize(("num_requests", "num_rows"), [(2, 8), (8, 2)])
def test_the_oldest_come_in_as_far_as_pages_and_rows_last(num_requests, num_rows):
    house = House(num_requests, num_rows)
    tasks = [house.ask(name) for name in "abc"]
    assert house.admit_all() == ["a", "b"]
    assert house.memory.reservations.num_reserved == 2 * PAGES_OF_ONE
    house.check()
    house.roster.remove(tasks[0])
    assert house.admit_all() == ["c"]
    assert house.roster.num_unfinished == 2
    house.check()


def test_only_those_whose_pages_are_here_join_the_batch():
    house = House(3, 8)
    first, second, _ = (house.ask(name) for name in "abc")
    house.admit_all()
    assert (house.roster.join(), house.roster.decoding) == ([], Decoding.NO)
    second.accept(0.0)
    assert house.roster.decoding is Decoding.SOON
    first.stage = Stage.READY
    assert house.roster.decoding is Decoding.NOW
    assert house.roster.join() == [first]
    assert (first.stage, house.roster.join()) == (Stage.RUNNING, [first])


def test_whoever_leaves_gives_everything_back():
    house = House(2, 8)
    waiting, admitted = house.ask("a"), house.ask("b")
    house.roster.queue.reverse()
    assert house.roster.admit_next() is admitted
    admitted.admit(0.0)
    for task in (waiting, admitted):
        house.roster.remove(task)
        assert task.stage is Stage.CLOSED
    assert house.roster.num_unfinished == 0
    house.memory.check_idle()


def test_nobody_leaves_in_mid_step():
    house = House(1, 1)
    task = house.ask("a")
    house.admit_all()
    house.roster.stepping = [task]
    with pytest.raises(AssertionError, match="compute thread"):
        house.roster.remove(task)
