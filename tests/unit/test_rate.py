"""What workers measure of their own speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.rate import Pace, Rate, StepTimer

sizes = st.lists(st.integers(1, 4096), min_size=2, max_size=30)


def timed(steps: list[tuple[int, float]], half_life_s: float = 10.0) -> Pace | None:
    timer = StepTimer(half_life_s)
    for num_tokens, seconds in steps:
        timer.add(num_tokens, seconds)
    return timer.pace


def test_nothing_measured_is_nothing_known():
    assert timed([]) is None
    assert Rate().per_s == 0.0


@given(sizes.filter(lambda tokens: max(tokens) >= 2 * min(tokens)), st.floats(0.001, 0.2), st.floats(1e-5, 1e-2))
def test_the_two_parts_of_a_step_are_told_apart(tokens, fixed_s, token_s):
    pace = timed([(n, fixed_s + n * token_s) for n in tokens], half_life_s=1e9)
    if pace.fixed_s == 0.0:  # sizes too much alike
        assert min(tokens) * token_s <= pace.token_s * max(tokens)
    else:
        assert pace.fixed_s == pytest.approx(fixed_s, rel=1e-3, abs=1e-5)
        assert pace.token_s == pytest.approx(token_s, rel=1e-3)


def test_steps_of_one_size_are_put_down_to_their_tokens():
    assert timed([(512, 0.5)] * 4) == Pace(0.0, pytest.approx(0.5 / 512))


def test_noise_makes_no_part_negative():
    assert timed([(100, 0.5), (500, 0.1)]) == Pace(0.0, pytest.approx(0.6 / 600, rel=0.1))
    assert timed([(100, 0.001), (500, 0.5)]) == Pace(0.0, pytest.approx(0.501 / 600, rel=0.1))


def test_the_past_fades():
    slow, fast = [(100, 1.0), (200, 2.0)] * 5, [(100, 0.1), (200, 0.2)] * 100
    assert timed(slow + fast, half_life_s=1.0).token_s == pytest.approx(0.001, rel=0.01)


def test_one_pause_makes_no_worker_slow_and_slow_steps_in_a_row_do():
    steps = [(100, 0.01)] * 50
    assert timed([*steps, (100, 2.0)]).token_s == pytest.approx(0.0001, rel=0.1)
    assert timed([*steps, *[(100, 0.1)] * 20]).token_s > 0.00025
    assert timed([*steps, *[(100, 1.0)] * 100]).token_s == pytest.approx(0.01, rel=0.1)


def test_a_short_step_after_long_ones_says_what_is_fixed():
    steps = [(512, 0.5)] * 50
    assert timed([*steps, *[(16, 0.1)] * 5]).fixed_s == pytest.approx(0.087, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 10.0)), min_size=1, max_size=50))
def test_a_pace_is_never_absurd(steps):
    pace = timed(steps)
    assert pace.token_s > 0
    assert 0 <= pace.fixed_s <= max(seconds for _, seconds in steps) * 1.0001
