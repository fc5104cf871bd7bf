"""Books of memory that others write into: nothing overlaps, and nothing is used again too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.transfer.arena import ALIGNMENT, LEAST_SLAB, Arena

MIB = 1 << 20


def test_a_shipment_gets_what_it_may_need():
    slab = Arena(64 * MIB).take(3 * MIB + 1)
    assert slab.num_bytes == 3 * MIB + ALIGNMENT


def test_who_wants_more_than_half_leaves_half_to_others():
    arena = Arena(64 * MIB)
    assert [arena.take(1 << 40).num_bytes for _ in range(3)] == [32 * MIB, 16 * MIB, 8 * MIB]


def test_scraps_are_not_worth_while_unless_they_are_enough():
    arena = Arena(2 * LEAST_SLAB)
    assert arena.take(1 << 40).num_bytes == LEAST_SLAB
    assert arena.take(LEAST_SLAB) is None
    assert arena.take(5000).num_bytes == 2 * ALIGNMENT


def give_back(arena, slab, *, is_clean, now_s=0.0):
    arena.give_back(slab.number, is_clean=is_clean, now_s=now_s)


def test_memory_that_may_be_written_into_is_used_again_when_its_sender_said_that_it_is_over():
    arena = Arena(8 * MIB)
    slab = arena.take(4 * MIB)
    give_back(arena, slab, is_clean=False)
    assert arena.take(4 * MIB).start != slab.start
    arena.clear(slab.number)
    assert arena.take(4 * MIB).start == slab.start


def test_the_sender_may_say_so_before_the_receiver_is_done():
    arena = Arena(8 * MIB)
    slab = arena.take(4 * MIB)
    arena.clear(slab.number)
    assert arena.take(4 * MIB).start != slab.start  # still held
    give_back(arena, slab, is_clean=False)
    assert arena.take(4 * MIB).start == slab.start


def test_strangers_clear_nothing():
    arena = Arena(8 * MIB)
    slab = arena.take(4 * MIB)
    arena.clear(slab.number + 1)
    give_back(arena, slab, is_clean=False)
    assert arena.num_lost_bytes(1.0) == 4 * MIB


def test_what_waits_for_long_is_lost_until_nobody_can_write():
    arena = Arena(8 * MIB)
    old, new, held = (arena.take(MIB) for _ in range(3))
    give_back(arena, old, is_clean=False, now_s=1.0)
    give_back(arena, new, is_clean=False, now_s=5.0)
    assert [arena.num_lost_bytes(before_s) for before_s in (1.0, 3.0, 9.0)] == [0, MIB, 2 * MIB]
    arena.clear_all()
    assert arena.num_lost_bytes(9.0) == 0
    give_back(arena, held, is_clean=False)  # it was shown to those who cannot write any more
    assert arena.num_lost_bytes(9.0) == 0


@given(st.lists(st.tuples(st.sampled_from(["take", "back", "dirty", "clear"]), st.integers(0, 3 * MIB)), max_size=60))
def test_no_two_slabs_ever_overlap(steps):
    arena, held, dirty = Arena(16 * MIB), [], []
    for step, number in steps:
        if step == "take":
            slab = arena.take(number)
            if slab is not None:
                assert slab.start % ALIGNMENT == slab.end % ALIGNMENT == 0
                assert slab.end <= 16 * MIB
                assert not any(slab.start < other.end and other.start < slab.end for other in held + dirty)
                held.append(slab)
        elif step == "clear" and dirty:
            arena.clear(dirty.pop(number % len(dirty)).number)
        elif held and step != "clear":
            slab = held.pop(number % len(held))
            give_back(arena, slab, is_clean=step == "back")
            dirty += [slab] * (step == "dirty")
    assert arena.num_held == len(held)


def test_an_arena_that_is_empty_again_is_whole():
    arena = Arena(4 * MIB + 17)
    slabs = [arena.take(MIB) for _ in range(3)]
    for slab in slabs[1:], slabs[:1]:
        for each in slab:
            give_back(arena, each, is_clean=True)
    assert arena.take(2 * MIB).start == 0


def test_a_slab_is_given_back_once():
    arena = Arena(4 * MIB)
    slab = arena.take(MIB)
    give_back(arena, slab, is_clean=True)
    with pytest.raises(KeyError):
        give_back(arena, slab, is_clean=True)
