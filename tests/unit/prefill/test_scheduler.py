"""The prefill planner: pure values in, pure values out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.prefill.scheduler import ChunkPlan, Progress, final_start, plan_step, step_room, usable_hit


@st.composite
def prompts(draw):
    num_tokens = draw(st.integers(1, 100))
    anchor = draw(st.integers(1, num_tokens))
    return num_tokens, anchor, draw(st.integers(1, 40)), draw(st.integers(0, 120))


@given(st.lists(prompts(), min_size=1, max_size=5), st.integers(1, 64), st.integers(1, 4), st.integers(1, 8))
def test_every_prompt_is_computed_once_and_its_window_in_one_chunk(specs, chunk_tokens, max_prompts, page_size):
    progress = []
    for num_tokens, anchor, window, num_cached in specs:
        done = usable_hit(min(num_cached, num_tokens), num_tokens, anchor, window, page_size)
        assert done % page_size == 0
        progress.append(Progress(done, num_tokens, final_start(num_tokens, anchor, window)))
    pending = list(enumerate(progress))
    for _ in range(1000):
        if not pending:
            break
        plan = plan_step([p for _, p in pending], chunk_tokens=chunk_tokens, max_prompts=max_prompts)
        assert plan, "work is left but nothing is planned"
        assert len(plan) <= max_prompts
        total = sum(chunk.end - chunk.start for chunk in plan)
        assert total <= chunk_tokens or len(plan) == 1
        for chunk in plan:
            number, before = pending[chunk.index]
            assert chunk.start == before.num_done
            assert chunk.start < chunk.end <= before.num_tokens
            if chunk.end == before.num_tokens:
                assert chunk.start <= before.final_start, "the last chunk must hold the whole window"
            pending[chunk.index] = (number, Progress(chunk.end, before.num_tokens, before.final_start))
        pending = [(number, p) for number, p in pending if p.num_done < p.num_tokens]
    assert not pending


def test_oldest_first_and_shared_budget():
    plan = plan_step([Progress(10, 30, 0), Progress(0, 8, 0), Progress(0, 50, 40)], chunk_tokens=32, max_prompts=8)
    assert plan == (ChunkPlan(0, 10, 30), ChunkPlan(1, 0, 8), ChunkPlan(2, 0, 4))


def test_a_chunk_stops_before_the_window_rather_than_inside():
    assert plan_step([Progress(0, 100, 68)], chunk_tokens=90, max_prompts=1) == (ChunkPlan(0, 0, 68),)
    assert plan_step([Progress(68, 100, 68)], chunk_tokens=16, max_prompts=1) == (ChunkPlan(0, 68, 100),)


def test_a_window_wider_than_the_room_waits_for_its_own_step():
    plan = plan_step([Progress(0, 10, 9), Progress(68, 100, 68)], chunk_tokens=16, max_prompts=2)
    assert plan == (ChunkPlan(0, 0, 10),)


def test_a_full_hit_still_computes_the_window():
    assert usable_hit(1000, 1000, 1000, 32, 16) == 960
    assert usable_hit(1000, 1000, 1000, 1, 16) == 992
    assert usable_hit(1000, 1000, 900, 32, 16) == 864  # resumed answer: anchored at the prompt's end


@pytest.mark.parametrize(
    ("tokens_per_s", "max_s", "room"),
    [
        (1000.0, None, 512),  # nobody decodes
        (1000.0, 0.2, 200),
        (10_000.0, 0.2, 512),
        (20.0, 0.2, 64),  # four pages at least, however slow
        (0.0, 0.2, 64),  # not measured yet: the smallest step measures
        (0.0, None, 512),
    ],
)
def test_a_step_is_cut_to_the_time_that_others_may_wait(tokens_per_s, max_s, room):
    assert step_room(512, 16, tokens_per_s=tokens_per_s, max_s=max_s) == room


def test_a_chunk_may_be_smaller_than_that():
    assert step_room(8, 16, tokens_per_s=1000.0, max_s=0.2) == 8


@given(st.floats(0, 0.1), st.floats(1e-5, 1e-2), st.floats(0.05, 1.0), st.integers(1, 4096))
def test_the_cut_settles_where_a_step_takes_as_long_as_it_may(fixed_s, token_s, max_s, first):
    """Steps have a part that does not depend on their size, and each is cut by the speed of the one before."""
    tokens = first
    for _ in range(60):
        took_s = fixed_s + tokens * token_s
        tokens = step_room(10**6, 16, tokens_per_s=tokens / took_s, max_s=max_s)
    assert tokens == 64 or fixed_s + tokens * token_s <= max_s * 1.05
