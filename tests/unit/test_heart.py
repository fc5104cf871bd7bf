"""Who a worker says it is, where it says it lives, and how often it says so."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import pytest

from packlight.core.config import PrefillConfig
from packlight.core.workers import Role, WorkerInfo, WorkerLoad
from packlight.fleet.heart import Heart, advertised_address, worker_identity
from packlight.fleet.memory import MemoryFleet
from tests.support.clock import FakeClock
from tests.support.fake_pair import until


@pytest.mark.parametrize(
    ("configured", "environ", "expected"),
    [
        ("mine", {"POD_NAME": "pod"}, "mine"),
        (None, {"POD_NAME": "pod"}, "pod"),
        (None, {}, f"prefill-{socket.gethostname()}-{os.getpid()}"),
    ],
    ids=["configured", "pod", "process"],
)
def test_the_id_is_the_configured_one_or_the_pod_s_or_the_process_s(configured, environ, expected):
    assert worker_identity(Role.PREFILL, PrefillConfig(worker_id=configured), environ)[0] == expected


def test_a_later_life_has_a_larger_generation():
    first = worker_identity(Role.PREFILL, PrefillConfig(), {})
    while (second := worker_identity(Role.PREFILL, PrefillConfig(), {})) == first:
        pass
    assert second[1] > first[1]


@pytest.mark.parametrize(
    ("fields", "environ", "expected"),
    [
        ({}, {}, "127.0.0.1:4000"),
        ({"host": "10.0.0.5"}, {}, "10.0.0.5:4000"),
        ({"host": "0.0.0.0"}, {}, f"{socket.gethostname()}:4000"),
        ({"host": "0.0.0.0"}, {"POD_IP": "10.1.2.3"}, "10.1.2.3:4000"),
        ({"advertise": "gateway"}, {"POD_IP": "10.1.2.3"}, "gateway:4000"),
        ({"advertise": "gateway:9"}, {}, "gateway:9"),
        # IPv6: an address with colons wants brackets before a port.
        ({"host": "::1"}, {}, "[::1]:4000"),
        ({"host": "::"}, {}, f"{socket.gethostname()}:4000"),
        ({"host": "0.0.0.0"}, {"POD_IP": "fd00::7"}, "[fd00::7]:4000"),
        ({"advertise": "fd00::7"}, {}, "[fd00::7]:4000"),
        ({"advertise": "[fd00::7]"}, {}, "[fd00::7]:4000"),
        ({"advertise": "[fd00::7]:9"}, {}, "[fd00::7]:9"),
    ],
)
def test_the_advertised_address(fields, environ, expected):
    assert advertised_address(PrefillConfig(**fields), 4000, environ) == expected


def card(num_running: int = 0) -> WorkerInfo:
    load = WorkerLoad(num_running=num_running)
    return WorkerInfo("prefill-0", 3, Role.PREFILL, "127.0.0.1:1", "m", "f", "c", load=load)


async def test_a_beat_reports_the_state_of_now_and_whatever_goes_with_it():
    board, also = MemoryFleet(5.0, FakeClock()), []
    states = iter([card(1), card(2)])

    async def with_it() -> None:
        also.append(len(await board.list()))

    heart = Heart(board, lambda: next(states), period_s=60.0, also=with_it)
    for num_running in (1, 2):
        await heart.beat()
        (sighting,) = await board.list()
        assert sighting.worker.load.num_running == num_running
    assert also == [1, 1]


async def test_it_goes_on_beating_whatever_goes_wrong(caplog):
    board, beats = MemoryFleet(5.0, FakeClock()), []

    async def stumble() -> None:
        beats.append(1)
        if len(beats) == 1:
            raise OSError("the network is down")

    heart = Heart(board, card, period_s=0.001, also=stumble)
    with caplog.at_level(logging.ERROR):
        running = asyncio.create_task(heart.run())
        await until(lambda: len(beats) >= 3)
    running.cancel()
    assert "a heartbeat failed" in caplog.text
    assert "the network is down" in caplog.text


async def test_stopping_takes_it_off_the_board_at_once_but_not_its_successor():
    board = MemoryFleet(5.0, FakeClock())
    heart = Heart(board, card, period_s=60.0)
    await heart.beat()
    await heart.stop()
    assert await board.list() == ()
    successor = WorkerInfo("prefill-0", 4, Role.PREFILL, "127.0.0.1:2", "m", "f", "c")
    await board.heartbeat(successor)
    await heart.beat()  # a late one of the life before
    await heart.stop()
    assert [sighting.worker for sighting in await board.list()] == [successor]
