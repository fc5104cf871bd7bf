"""What every task promises, and what each one's answer is, found by means of its own."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import ConfigError
from packlight.evaluate.tasks import TASKS, Sample, find_task, make_sample, make_two_turn
from packlight.evaluate.tasks import base as tasks_base
from packlight.evaluate.tasks.essays import essay_sentences
from packlight.evaluate.tasks.haystack import hide, noise_sentences
from packlight.evaluate.tasks.tracking import VariableTracking
from packlight.evaluate.tasks.words import ADJECTIVES, NOUNS
from tests.unit.evaluate.counting import count_tokens

NIAH = [name for name in TASKS if name.startswith("niah_")]
LENGTHS = st.integers(1024, 4500)
SEEDS = st.integers(0, 2**32)
DEPTHS = st.floats(0, 1)


def text_of(sample: Sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


def question_of(sample: Sample) -> str:
    return sample.messages[-1]["content"].rsplit("\n", 1)[-1]


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=8, deadline=None)
@given(length=LENGTHS, depth=DEPTHS, seed=SEEDS)
def test_a_prompt_fills_its_length_and_never_exceeds_it(name: str, length: int, depth: float, seed: int) -> None:
    sample = make_sample(name, length, depth, seed, count_tokens)
    counted = sum(count_tokens(message["content"]) for message in sample.messages) + count_tokens(sample.answer_prefix)
    assert sample.num_tokens == counted
    assert 0.9 * length <= counted <= length


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_a_function_of_its_seed(name: str) -> None:
    one, again, other = (make_sample(name, 1500, 0.5, seed, count_tokens) for seed in (1, 1, 2))
    assert one == again
    assert set(one.references).isdisjoint(other.references) or name == "cwe"
    assert one.references != other.references


@pytest.mark.parametrize("name", TASKS)
def test_no_sample_gives_its_answer_away(name: str) -> None:
    sample = make_sample(name, 1500, 0.5, 3, count_tokens)
    for reference in sample.references:
        assert reference not in sample.answer_prefix
        assert reference not in question_of(sample)


@pytest.mark.parametrize("name", NIAH)
@settings(max_examples=8, deadline=None)
@given(length=LENGTHS, depth=DEPTHS, seed=SEEDS)
def test_each_value_asked_for_is_stated_once_and_by_its_key(name: str, length: int, depth: float, seed: int) -> None:
    sample = make_sample(name, length, depth, seed, count_tokens)
    stated = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text_of(sample))
    values = [value for _, value in stated]
    assert len(values) == len(set(values))
    assert all(text_of(sample).count(reference) == 1 for reference in sample.references)
    asked = set(re.split(r",? and |, ", re.search(r" for (.+) mentioned", question_of(sample))[1]))  # type: ignore[index]
    assert {key for key, value in stated if value in sample.references} == asked
    assert {value for key, value in stated if key in asked} == set(sample.references)


@pytest.mark.parametrize("name", NIAH)
def test_no_key_has_two_values_unless_the_task_says_so(name: str) -> None:
    stated = re.findall(r" for (\S+) is: ", text_of(make_sample(name, 6000, 0.5, 0, count_tokens)))
    assert set(Counter(stated).values()) == {4 if name == "niah_multivalue" else 1}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])
@settings(max_examples=8, deadline=None)
@given(depth=DEPTHS, seed=SEEDS)
def test_the_needle_stands_at_its_depth(name: str, depth: float, seed: int) -> None:
    sample = make_sample(name, 3000, depth, seed, count_tokens)
    context = text_of(sample).split("\n")[1]
    before, _, after = context.partition(sample.references[0])
    assert sample.depth == depth
    # A needle stands between sentences, and sentences differ in length.
    assert count_tokens(before) / (count_tokens(before) + count_tokens(after)) == pytest.approx(depth, abs=0.06)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.has_depth])
def test_a_task_whose_answer_is_everywhere_has_no_depth(name: str) -> None:
    one, other = (make_sample(name, 2000, depth, 0, count_tokens) for depth in (0.1, 0.9))
    assert one == other
    assert one.depth is None


def run_assignments(text: str) -> dict[str, int]:
    """An interpreter of the little language: a variable used before it is assigned is a KeyError."""
    values: dict[str, int] = {}
    for name, number, source in re.findall(r"VAR ([A-Z]+) = (?:(\d+)|VAR ([A-Z]+))", text):
        assert name not in values
        values[name] = int(number) if number else values[source]
    return values


@settings(max_examples=25, deadline=None)
@given(num_chains=st.integers(1, 4), num_hops=st.integers(0, 6), length=LENGTHS, seed=SEEDS)
def test_tracked_variables_are_those_that_hold_the_value(
    num_chains: int, num_hops: int, length: int, seed: int
) -> None:
    task = VariableTracking(num_chains, num_hops)
    sample = tasks_base.make_sample("vt", task, length, 0.0, seed, count_tokens)
    asked = int(re.search(r"the value (\d+)", question_of(sample))[1])  # type: ignore[index]
    values = run_assignments(text_of(sample))
    assert len(values) == num_chains * (num_hops + 1)
    assert [name for name, value in values.items() if value == asked] == list(sample.references)


@pytest.mark.parametrize(("length", "common", "other"), [(1024, 6, 1), (4095, 6, 1), (4096, 30, 3), (40_000, 30, 3)])
def test_common_words_are_the_most_common(length: int, common: int, other: int) -> None:
    sample = make_sample("cwe", length, 0.0, 5, count_tokens)
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", sample.messages[-1]["content"]))
    assert {word for word, count in counts.items() if count == common} == set(sample.references)
    assert {count for word, count in counts.items() if word not in sample.references} == {other}
    assert len(sample.references) == 10


def test_the_worked_example_of_common_words_is_right_and_tells_nothing() -> None:
    sample = make_sample("cwe", 8000, 0.0, 5, count_tokens)
    example, answer, question = (re.findall(r"\d+\. ([a-z-]+)", message["content"]) for message in sample.messages)
    assert {word for word, _ in Counter(example).most_common(10)} == set(answer)
    assert set(example).isdisjoint(question)


@settings(max_examples=8, deadline=None)
@given(length=LENGTHS, depth=DEPTHS, seed=SEEDS)
def test_the_second_question_is_about_the_other_fact(length: int, depth: float, seed: int) -> None:
    first, second = make_two_turn(length, depth, seed, count_tokens)
    assert second.messages[0] == first.messages[0]
    assert second.messages[1]["content"].startswith(first.answer_prefix)
    assert first.references[0] in second.messages[1]["content"]
    assert second.references[0] not in text_of(second).split("\n", 2)[2]
    document = second.messages[0]["content"]
    assert document.count(first.references[0]) == document.count(second.references[0]) == 1
    assert 0.9 * length <= second.num_tokens <= length
    places = [document.index(sample.references[0]) / len(document) for sample in (first, second)]
    assert 0.4 < abs(places[0] - places[1]) < 0.6


@pytest.mark.parametrize("name", TASKS)
def test_a_length_with_no_room_is_refused_with_the_least_that_has(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs at least (\d+)") as refused:
        make_sample(name, 20, 0.5, 0, count_tokens)
    least = int(re.search(r"at least (\d+)", refused.value.message)[1])  # type: ignore[index]
    assert make_sample(name, least + 10, 0.5, 0, count_tokens).num_tokens <= least + 10


@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan")])
def test_a_depth_outside_the_text_is_refused(depth: float) -> None:
    with pytest.raises(ConfigError, match="is outside"):
        make_sample("niah_single_1", 1000, depth, 0, count_tokens)
    with pytest.raises(ConfigError, match="is outside"):
        make_two_turn(1000, depth, 0, count_tokens)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="niah_single_1"):
        find_task("niah_single_9")


def test_needles_are_put_in_order_without_losing_a_sentence() -> None:
    haystack = list(islice(noise_sentences(), 4))
    needles = [(1.0, "last"), (0.5, "middle"), (0.0, "first"), (0.5, "next")]
    assert hide(needles, haystack) == " ".join(["first", *haystack[:2], "middle", "next", *haystack[2:], "last"])


def test_essays_read_like_text_and_hardly_repeat() -> None:
    sentences = list(islice(essay_sentences(0), 4000))
    assert len(set(sentences)) > 0.97 * len(sentences)
    assert all(re.fullmatch(r"[A-Z][a-zA-Z, ]+\.", sentence) for sentence in sentences)
    assert not re.search(r"\b[Aa] [aeiou]|magic|variable", " ".join(sentences))


def test_a_longer_essay_begins_with_the_shorter_one() -> None:
    assert list(islice(essay_sentences(7), 50)) == list(islice(essay_sentences(7), 500))[:50]


def test_no_word_is_part_of_another() -> None:
    words = ADJECTIVES + NOUNS
    assert len(set(words)) == len(words)
    assert [(one, other) for one in words for other in words if one != other and one in other] == []
