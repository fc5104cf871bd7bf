"""Whose turn it is on a compute thread: decode steps are never kept waiting by more than one prefill step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from packlight.engine.compute import Compute, Decoding


@pytest.fixture
async def compute() -> AsyncIterator[Compute]:
    compute = Compute(max_stall_s=0.25)
    yield compute
    compute.close()


class Steps:
    """Steps that write down that they ran. A held one keeps the thread busy until the test lets go."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def step(self, name: str):
        return lambda: self.ran.append(name)

    def held(self, name: str) -> tuple[threading.Event, object]:
        hold = threading.Event()

        def step() -> None:
            hold.wait(10)
            self.ran.append(name)

        return hold, step


async def turns(num: int = 5) -> None:
    """Everything that can go on without the compute thread has gone on."""
    for _ in range(num):
        await asyncio.sleep(0)


async def test_the_result_and_the_times_of_a_step(compute):
    steps = Steps()
    hold, step = steps.held("p")
    first = asyncio.create_task(compute.prefill(step))
    await turns()
    second = asyncio.create_task(compute.decode(lambda: 7))
    await turns()
    hold.set()
    ran = await second
    assert ran.result == 7
    assert ran.waited_s > 0
    assert ran.took_s >= 0
    assert (await first).result is None


async def test_what_a_step_raises_is_raised_and_the_next_one_runs(compute):
    with pytest.raises(ZeroDivisionError):
        await compute.decode(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await compute.prefill(lambda: 1 / 0)
    assert (await compute.prefill(lambda: 3)).result == 3


async def test_prefill_steps_are_limited_while_answers_run_or_are_about_to(compute):
    assert compute.max_prefill_s is None
    compute.set_decoding(Decoding.SOON)
    assert compute.max_prefill_s == 0.25
    compute.set_decoding(Decoding.NOW)
    assert compute.max_prefill_s == 0.25
    compute.set_decoding(Decoding.NO)
    assert compute.max_prefill_s is None


@pytest.mark.parametrize("decoding", [Decoding.NO, Decoding.SOON])
async def test_prefill_goes_on_alone_while_no_answer_runs(compute, decoding):
    compute.set_decoding(decoding)
    for number in range(3):
        assert (await compute.prefill(lambda n=number: n)).result == number


async def test_a_second_prefill_step_waits_for_a_decode_step_however_late_that_comes(compute):
    """The event loop may be busy with something else between two decode steps; the thread stands idle meanwhile."""
    steps = Steps()
    compute.set_decoding(Decoding.NOW)
    await compute.prefill(steps.step("p1"))
    second = asyncio.create_task(compute.prefill(steps.step("p2")))
    await turns(50)
    assert steps.ran == ["p1"]
    await compute.decode(steps.step("d"))
    await second
    assert steps.ran == ["p1", "d", "p2"]


async def test_a_decode_step_that_began_before_does_not_count_as_a_turn(compute):
    steps = Steps()
    compute.set_decoding(Decoding.NOW)
    hold, held = steps.held("d1")
    decoding = asyncio.create_task(compute.decode(held))
    await turns()
    prefills = [asyncio.create_task(compute.prefill(steps.step(name))) for name in ("p1", "p2")]
    await turns()
    hold.set()
    await decoding
    await prefills[0]
    await turns(50)
    assert steps.ran == ["d1", "p1"]
    await compute.decode(steps.step("d2"))
    await prefills[1]
    assert steps.ran == ["d1", "p1", "d2", "p2"]


async def test_when_the_last_answer_ends_prefill_goes_on(compute):
    compute.set_decoding(Decoding.NOW)
    await compute.prefill(lambda: None)
    waiting = asyncio.create_task(compute.prefill(lambda: 2))
    await turns()
    assert not waiting.done()
    compute.set_decoding(Decoding.NO)
    assert (await waiting).result == 2


async def test_neither_starves(compute):
    """Both loops as fast as they can: strictly in turns."""
    steps = Steps()
    compute.set_decoding(Decoding.NOW)

    async def loop(run, name: str) -> None:
        for _ in range(200):
            await run(steps.step(name))
        compute.set_decoding(Decoding.NO)

    await asyncio.gather(loop(compute.decode, "d"), loop(compute.prefill, "p"))
    both = steps.ran[: steps.ran.index("p") + 300]
    assert "pp" not in "".join(both)
    assert "".join(both).count("p") > 100
