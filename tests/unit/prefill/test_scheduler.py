"""The prefill planner: pure values in, pure values out."""

from hypothesis import given
from hypothesis import strategies as st

from packlight.prefill.scheduler import ChunkPlan, Progress, final_start, plan_step, usable_hit


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
