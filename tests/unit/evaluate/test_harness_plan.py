"""What an evaluation is made of, before anything runs: variants, prompts and groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.compress.parts import CODECS
from packlight.compress.recipes import RECIPES
from packlight.core.errors import ConfigError, RequestNeverFits
from packlight.evaluate.groups import LARGEST_TO_SMALLEST, Size, num_pages_of, plan_groups
from packlight.evaluate.plan import TEMPLATE_TOKENS, Plan, check_lengths, split_by_fit
from packlight.evaluate.prompts import Job, make_jobs, make_prompt, num_shared
from packlight.evaluate.results import TEACHER_FORCED
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.variants import NATIVE, make_grid, make_variant, parse_codecs, parse_recipes
from packlight.models.fake_spec import FakeTokenizer, fake_spec

# ── variants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_is_the_whole_table():
    assert [choice.name for choice in parse_recipes("all")] == list(RECIPES)
    assert parse_codecs("all") == tuple(CODECS)


def test_a_recipe_with_options():
    plain, tuned = parse_recipes("snapkv, snapkv:kernel=5:pooling=avg")
    variant = make_variant(tuned, "int4", 8)
    assert (variant.recipe, variant.spec.recipe) == ("snapkv:kernel=5:pooling=avg", "snapkv")
    assert (variant.spec.kernel, variant.spec.pooling, variant.spec.codec, variant.spec.ratio) == (
        5,
        "avg",
        "int4",
        0.125,
    )
    assert make_variant(plain, NATIVE, 8).spec.kernel is None


@pytest.mark.parametrize("factor", [1, 3, 32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_factor_is_the_budget_asked_for(recipe, factor):
    (choice,) = parse_recipes(recipe)
    spec = make_variant(choice, NATIVE, factor).spec
    assert spec.ratio == (1 / factor if RECIPES[recipe].has_budget else None)
    assert spec.budget_tokens is None


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("snapkv,vanish", r"unknown recipe 'vanish'; choose one of none, streaming_llm"),
        ("snapkv:kernel", r"--recipes snapkv:kernel: expected option=value.*got 'kernel'"),
        ("snapkv:kernel=4", r"snapkv:kernel=4: kv\.kernel: got 4, must be odd"),
        ("snapkv:colour=red", r"snapkv:colour=red: kv\.colour: .*no such option"),
        ("snapkv:codec=int4", r"snapkv:codec=int4: codec has a flag of its own, --codecs"),
        ("snapkv:budget=64", r"snapkv:budget=64: budget has a flag of its own, --factors"),
        ("h2o:evict=true", r"h2o:evict=true: eviction while decoding is not part of the evaluation"),
        ("none:window=3", r"none:window=3: kv\.window"),
    ],
)
def test_recipes_that_do_not_exist_are_refused(recipes, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(parse_recipes(recipes), (), (2,), coded=())


def test_unknown_codecs_and_factors_below_1_are_refused():
    with pytest.raises(ConfigError, match="unknown codec 'zip': choose from native"):
        parse_codecs("native,zip")
    with pytest.raises(ConfigError, match=r"factor 0\.5 is below 1"):
        make_grid(parse_recipes("snapkv"), (), (0.5,), coded=())


def test_the_grid():
    grid = make_grid(parse_recipes("snapkv,h2o,none"), ("native", "int4"), (2, 8), coded=("none", "snapkv"))
    assert [(variant.recipe, variant.codec, variant.factor) for variant in grid] == [
        ("none", "native", 1),
        ("snapkv", "native", 2),
        ("snapkv", "native", 8),
        ("h2o", "native", 2),
        ("h2o", "native", 8),
        ("none", "int4", 1),
        ("snapkv", "int4", 2),
        ("snapkv", "int4", 8),
    ]


def test_what_a_model_cannot_have_is_told_apart():
    grid = make_grid(parse_recipes("adakv,snapkv"), ("native",), (2,), coded=())
    fitting, refused = split_by_fit(grid, fake_spec())
    assert [variant.recipe for variant in fitting] == ["none", "snapkv"]
    assert len(refused) == 1
    assert "adakv" in refused[0]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_a_grid_and_begin_with_a_little_of_everything():
    jobs = make_jobs(("niah_single_1", "vt", TEACHER_FORCED, TWO_TURN), (2000, 1000), 2, 2, seed=7)
    first = jobs[: len(jobs) // 2]
    assert jobs == (*first, *(replace(job, seed=8) for job in first))
    assert [(job.task, job.length, job.depth) for job in first[: len(first) // 2]] == [
        ("niah_single_1", 1000, 0.25),
        ("niah_single_1", 1000, 0.75),
        ("vt", 1000, 0.5),
        (TEACHER_FORCED, 1000, 0.5),
        (TWO_TURN, 1000, 0.25),
        (TWO_TURN, 1000, 0.75),
    ]


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="unknown task 'riddle'"):
        make_jobs(("riddle",), (1000,), 1, 1, 0)


def test_a_prompt_ends_with_the_beginning_of_the_answer():
    prompt = make_prompt(Job("niah_single_1", 1000, 0.5, 0), FakeTokenizer())
    text = FakeTokenizer().decode(prompt.token_ids)
    assert text.endswith(prompt.sample.answer_prefix)
    assert prompt.turn_ends == (len(prompt.token_ids),) == (prompt.sample.num_tokens,)
    (number,) = prompt.sample.references
    assert text.count(number) == 1


def test_two_turns_share_the_document_and_the_first_question():
    prompt = make_prompt(Job(TWO_TURN, 1500, 0.25, 0), FakeTokenizer())
    first_end, second_end = prompt.turn_ends
    text = FakeTokenizer().decode(prompt.token_ids)
    assert second_end == len(text)
    (second_value,) = prompt.sample.references
    first, rest = text[:first_end], text[first_end:]
    assert second_value in first, "the first turn's prompt holds both facts"
    assert second_value not in rest, "and the second turn gives nothing away"
    assert rest.endswith(prompt.sample.answer_prefix)
    assert first.endswith(" is"), "the first turn ends where its answer begins"


def test_a_continued_text_has_no_right_answer():
    prompt = make_prompt(Job(TEACHER_FORCED, 800, 0.5, 3), FakeTokenizer())
    assert prompt.sample.references == ()
    assert prompt.sample.depth is None
    assert 700 < len(prompt.token_ids) <= 800


def test_num_shared():
    assert num_shared([1, 2, 3], [1, 2, 4, 3]) == 2
    assert num_shared([1], [1, 2]) == 1
    assert num_shared([], [1]) == 0


def test_prompts_must_fit_the_model():
    spec = fake_spec(max_context=1000)
    room = 1000 - 32 - TEMPLATE_TOKENS
    check_lengths([1, room], spec, 32)
    for length in (0, room + 1):
        with pytest.raises(ConfigError, match=f"got {length}, must be from 1 to {room}: the model's window of 1000"):
            check_lengths([length], spec, 32)


def test_codecs_take_no_part_in_turns():
    grid = make_grid(parse_recipes("snapkv,h2o"), ("int4",), (2,), coded=("snapkv",))
    plan = Plan((Job("vt", 500, 0.5, 0), Job(TWO_TURN, 500, 0.5, 0)), grid)
    assert [(variant.recipe, variant.codec) for variant in plan.variants_of(plan.jobs[1])] == [
        ("none", "native"),
        ("snapkv", "native"),
    ]
    assert plan.num_steps == 4 + 2 * 2


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────

sizes = st.lists(st.builds(Size, st.integers(1, 2), st.integers(1, 50)), max_size=30)


@given(sizes, st.integers(100, 300), st.integers(2, 12))
def test_groups_hold_everything_once_and_fit(sizes, max_pages, max_rows):
    groups = plan_groups(sizes, max_pages=max_pages, max_rows=max_rows)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        members = [sizes[index] for index in group]
        assert num_pages_of(members) <= max_pages
        assert sum(member.num_rows for member in members) <= max_rows
        pages = [member.num_pages for member in members]
        assert max(pages) <= LARGEST_TO_SMALLEST * min(pages)


def test_groups_are_as_large_as_they_may_be():
    assert plan_groups([Size(2, 10)] * 6, max_pages=60, max_rows=99) == [[0, 1, 2], [3, 4, 5]]
    assert plan_groups([Size(2, 4), Size(2, 10), Size(2, 5)], max_pages=99, max_rows=99) == [[1, 2], [0]]


@pytest.mark.parametrize("size", [Size(2, 51), Size(5, 1)])
def test_what_can_never_fit_is_refused(size):
    with pytest.raises(RequestNeverFits, match="the pool has 100 and 4 rows"):
        plan_groups([size], max_pages=100, max_rows=4)
