"""Plans: prompts of exact length, the same load for the same seed, and other words for another one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from loadtest.plan import Plan, read_plan
from loadtest.planning import make_plan, most_questions
from loadtest.scenario import FOLDER, Scenario, find_scenario, load_scenario, scenario_names
from loadtest.settings import build, override
from packlight.bench.serve.prompts import Prompts, Question
from packlight.core.errors import ConfigError
from packlight.models.fake_spec import FakeTokenizer

SOURCE = FOLDER / "made_up.yaml"
FAKE = Prompts(FakeTokenizer(), "chat")
CHAT = {
    "about": "a test",
    "duration_s": 10,
    "arrivals": {"kind": "steady", "rate_per_s": 2},
    "prompts": {"kind": "chat", "prompt_tokens": [200, 400], "max_tokens": 8},
}


def scenario_of(*changes: str) -> Scenario:
    return build(Scenario, override(CHAT, changes), "made up")


def plan_of(*changes: str, seed: int = 0, max_context: int = 100_000) -> Plan:
    return make_plan(scenario_of(*changes), SOURCE, FAKE, {"model": "m"}, seed, max_context)


def lengths(plan: Plan) -> list[int]:
    return [FAKE.count(each.system, Question(each.turns[0].content)) for each in plan.conversations]


def test_prompts_have_exactly_the_lengths_that_are_asked_for():
    plan = plan_of("duration_s=30")
    assert set(lengths(plan)) == {200, 400}
    assert len(plan.conversations) == pytest.approx(60, abs=25)


def test_another_seed_changes_the_words_and_not_the_load():
    one, same, other = plan_of(), plan_of(), plan_of(seed=1)
    assert one == same
    assert [each.due_s for each in one.conversations] == [each.due_s for each in other.conversations]
    assert lengths(one) == lengths(other)
    texts = [{each.turns[0].content for each in plan.conversations} for plan in (one, other)]
    assert not texts[0] & texts[1]


def test_the_scenarios_seed_changes_the_load():
    assert [c.due_s for c in plan_of().conversations] != [c.due_s for c in plan_of("seed=1").conversations]


SHARED = "prompts={kind: shared_document, prompt_tokens: 3000, question_tokens: 400, documents: 2, max_tokens: 8}"


def test_questions_about_one_document_begin_alike():
    plan = plan_of(SHARED)
    assert set(lengths(plan)) == {3000}
    beginnings = {each.turns[0].content[:2000] for each in plan.conversations}
    assert len(beginnings) == 2
    assert sum(not each.is_follow_up for each in plan.conversations) == 2


def test_a_document_makes_room_for_the_next_one():
    plan = plan_of(SHARED, "prompts.documents=1", "duration_s=40")
    beginnings = {each.turns[0].content[:1500] for each in plan.conversations}
    assert len(beginnings) == -(-len(plan.conversations) // most_questions(2600, FAKE)) > 1
    assert set(lengths(plan)) == {3000}


def test_later_turns_ask_on_after_a_pause():
    turns = "prompts={kind: multi_turn, prompt_tokens: 800, question_tokens: 300, turns: 3, max_tokens: 8, think_s: 2}"
    plan = plan_of(turns, "duration_s=100")
    for conversation in plan.conversations:
        first, *later = conversation.turns
        assert first.think_s == 0
        assert len(later) == 2
        assert all(turn.references for turn in conversation.turns)
    pauses = [turn.think_s for each in plan.conversations for turn in each.turns[1:]]
    assert sum(pauses) / len(pauses) == pytest.approx(2, rel=0.25)


def test_a_trace_becomes_conversations_of_its_lengths():
    scenario = load_scenario(find_scenario("trace_replay"))
    plan = make_plan(scenario, find_scenario("trace_replay"), FAKE, {}, 0, 16_384)
    due_s = [each.due_s for each in plan.conversations]
    assert due_s[0] == 0
    assert all(before <= after for before, after in pairwise(due_s))
    assert any(each.is_follow_up for each in plan.conversations)
    assert "at speed 1, lengths x 1 " in plan.notes[0]
    smaller = make_plan(scenario, find_scenario("trace_replay"), FAKE, {}, 0, 4096)
    assert all(
        length + each.turns[0].max_tokens <= 4096
        for length, each in zip(lengths(smaller), smaller.conversations, strict=True)
    )


@pytest.mark.parametrize("name", [name for name in scenario_names() if name != "trace_replay"])
def test_every_shipped_scenario_can_be_planned_for_smollm2(smollm2, name):
    """A tenth of its requests, which all fit the model."""
    path = find_scenario(name)
    scenario = load_scenario(path)
    few = scenario.model_copy(update={"duration_s": max(24.0, scenario.duration_s / 10)})
    assert make_plan(few, path, Prompts(smollm2.tokenizer, "chat"), {}, 0, smollm2.spec.max_context).conversations


def test_a_plan_survives_its_file(tmp_path):
    plan = plan_of()
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.end_s == pytest.approx(70)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(tmp_path / "none.json")
    Path(tmp_path / "bad.json").write_text('{"scenario": 1}')
    with pytest.raises(ConfigError, match=r"bad\.json: "):
        read_plan(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["prompts.prompt_tokens=10"], "a prompt of 10 tokens is too short"),
        (["prompts.prompt_tokens=99999"], "conversations of 100007 tokens do not fit the model, which reads 100000"),
        (["arrivals.rate_per_s=0.0001"], "no request is due within duration_s 10"),
    ],
)
def test_what_cannot_be_asked(changes, told):
    with pytest.raises(ConfigError, match=told):
        plan_of(*changes)
