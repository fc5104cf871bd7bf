"""Lent memory: whose it is, when it comes back, and how much of it is kept."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.kv.lending import ALIGNMENT, Lending, capacity_for, pageable


class Counted:
    """An allocator that tells what it was asked for."""

    def __init__(self):
        self.sizes = []

    def __call__(self, num_bytes):
        self.sizes.append(num_bytes)
        return pageable(num_bytes)


def test_memory_is_used_again_when_nobody_has_it_any_more():
    allocate = Counted()
    lending = Lending(1 << 20, allocate)
    first, second = lending.lend(1000), lending.lend(1000)
    address = first.data_ptr()
    assert second.data_ptr() != address
    del first
    assert lending.lend(990).data_ptr() == address
    assert len(allocate.sizes) == 2


@pytest.mark.parametrize(
    "reader",
    [
        lambda lent: lent.view(torch.bfloat16).view(-1, 2, 4),
        lambda lent: lent.numpy(),
        lambda lent: memoryview(lent.numpy())[3:5],
        lambda lent: torch.frombuffer(memoryview(lent.numpy())[8:], dtype=torch.uint8)[1:],
        lambda lent: lent.view(8, -1)[2].view(torch.int32).numpy()[:1],
    ],
)
def test_whoever_can_read_it_has_it(reader):
    lending = Lending(1 << 20)
    held = reader(lending.lend(1024))
    assert lending.num_lent_bytes == 1024
    assert lending.num_idle_bytes == 0
    del held
    assert (lending.num_lent_bytes, lending.num_idle_bytes) == (0, 1024)


def test_it_comes_back_from_any_thread_and_says_so():
    lending, told = Lending(1 << 20), []
    held = [lending.lend(100, lambda: told.append(threading.current_thread()))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert told == [thread]
    assert lending.num_lent_bytes == 0


def test_no_more_is_kept_than_the_limit_beside_what_is_lent():
    lending = Lending(3000)
    held = [lending.lend(1024) for _ in range(4)]
    held.pop()
    assert (lending.num_lent_bytes, lending.num_idle_bytes) == (3072, 0)
    held.pop()
    assert (lending.num_lent_bytes, lending.num_idle_bytes) == (2048, 0)
    del held
    assert (lending.num_lent_bytes, lending.num_idle_bytes) == (0, 2048)


def test_idle_memory_makes_room_for_what_it_does_not_fit():
    lending = Lending(4096)
    for size in (1024, 1024, 3072):
        lending.lend(size)
    held = lending.lend(2048), lending.lend(2048)
    assert lending.num_idle_bytes == 0
    assert sum(len(each) for each in held) == 4096


def test_room_is_what_the_limit_leaves_and_one_may_always_be_lent():
    lending = Lending(2048)
    assert lending.has_room(1 << 30)
    held = lending.lend(1024)
    assert lending.has_room(1024)
    assert not lending.has_room(1025)
    del held
    assert lending.has_room(1 << 30)


def test_a_small_layer_does_not_take_a_large_ones_memory():
    allocate = Counted()
    lending = Lending(1 << 30, allocate)
    lending.lend(1 << 20)
    lending.lend(1 << 18)
    assert allocate.sizes == [1 << 20, 1 << 18]


@given(st.integers(0, 1 << 40))
def test_capacities_fit_and_waste_little(num_bytes):
    capacity = capacity_for(num_bytes)
    assert capacity % ALIGNMENT == 0
    assert num_bytes <= capacity <= max(ALIGNMENT, num_bytes + max(ALIGNMENT, num_bytes // 8))


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=40))
def test_nothing_is_lent_twice_and_the_sums_are_right(steps):
    lending, held = Lending(8192), {}
    for number, (gives_back, size) in enumerate(steps):
        if gives_back and held:
            held.pop(min(held))
        else:
            held[number] = lending.lend(size).fill_(number)
    assert all(bool((lent == number).all()) for number, lent in held.items())
    assert lending.num_lent_bytes >= sum(len(lent) for lent in held.values())
    assert lending.num_idle_bytes == 0 or lending.num_lent_bytes + lending.num_idle_bytes <= 8192
