from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.types import Finished, FinishReason, GenerateRequest, SamplingParams, StopRules, Token, Usage
from packlight.router.choice import Choice, Delta
from tests.support.tiny_tokenizer import EOS_ID, tiny_tokenizer
from tests.unit.router.test_stops import cut

TOKENIZER = tiny_tokenizer()
SAMPLES = ["Hello world, žluťoučký kůň 🎉🎉 日本語", "two\nlines\n\nand a \ufffd", "stop the stop of the stop"]


def request(*, stop: StopRules | None = None, num_logprobs: int | None = None) -> GenerateRequest:
    return GenerateRequest(
        "r", (5,), 1, SamplingParams(num_logprobs=num_logprobs), stop or StopRules(1000, eos_token_ids=(EOS_ID,))
    )


def finished(num_generated: int, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished("r", reason, Usage(1, 0, num_generated))


def run(groups: list[list[int]], stops: list[str] | None = None, wanted: GenerateRequest | None = None) -> list[Delta]:
    """All deltas of an answer whose tokens come in `groups`."""
    choice = Choice(0, wanted or request(), TOKENIZER, stops or [])
    deltas = []
    for group in groups:
        deltas.append(choice.push([Token(token_id, -0.5) for token_id in group]))
        if choice.finish_reason is not None:
            return deltas
    return [*deltas, choice.finish(finished(sum(map(len, groups))))]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def any_token() -> st.SearchStrategy[int]:
    """Any token: special ones, bytes that are not UTF-8 and whole words alike."""
    return st.integers(0, TOKENIZER.vocab_size - 1)


any_answer = st.one_of(st.lists(any_token(), max_size=30), st.sampled_from([TOKENIZER.encode(s) for s in SAMPLES]))


@st.composite
def answers_in_groups(draw: st.DrawFn) -> tuple[list[list[int]], list[str]]:
    ids = [token_id for token_id in draw(any_answer) if token_id != EOS_ID]
    borders = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=8)))
    groups = [ids[a:b] for a, b in zip([0, *borders], [*borders, len(ids)], strict=True)]
    text = TOKENIZER.text(ids)
    starts = draw(st.lists(st.integers(0, max(len(text) - 1, 0)), max_size=3))
    stops = [text[start : start + draw(st.integers(1, 5))] for start in starts if text]
    return groups, [*stops, "never there"]


@given(answers_in_groups())
def test_a_stream_says_what_a_whole_answer_says(case: tuple[list[list[int]], list[str]]) -> None:
    groups, stops = case
    ids = [token_id for group in groups for token_id in group]
    expected, matched = cut(TOKENIZER.text(ids), stops)
    deltas = run(groups, stops)
    assert text_of(deltas) == expected == text_of(run([ids], stops)) == text_of(run([[i] for i in ids], stops))
    assert deltas[-1].finish_reason is (FinishReason.STOP if matched else FinishReason.LENGTH)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


@given(st.lists(any_token().filter(lambda token_id: token_id != EOS_ID), max_size=30))
def test_half_a_character_is_never_shown(ids: list[int]) -> None:
    """U+FFFD appears only for bytes that no continuation could have completed, or at the very end."""
    deltas = run([[token_id] for token_id in ids])
    visible = b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids)
    assert text_of(deltas) == visible.decode(errors="replace")
    so_far, shown = b"", ""
    for token_id, delta in zip(ids, deltas, strict=False):
        so_far += TOKENIZER.token_bytes(token_id)
        shown += delta.text
        assert shown == codecs.getincrementaldecoder("utf-8")("replace").decode(so_far)


@given(answers_in_groups())
def test_logprobs_cover_exactly_the_shown_text(case: tuple[list[list[int]], list[str]]) -> None:
    groups, stops = case
    deltas = run(groups, stops, request(num_logprobs=0))
    text = text_of(deltas)
    shown = [token for delta in deltas for token in delta.tokens]
    said = b"".join(TOKENIZER.token_bytes(token.token.token_id) for token in shown)
    # A stop string may begin in the middle of the last token.
    assert said.decode(errors="replace").startswith(text)
    assert all(token.offset <= len(text) for token in shown)
    so_far = 0
    for delta in deltas:
        so_far += len(delta.text)
        if delta.finish_reason is None:
            assert all(token.offset < so_far for token in delta.tokens)


def test_a_token_that_is_half_a_character_keeps_its_bytes() -> None:
    ids = TOKENIZER.encode("é🎉")
    deltas = run([[token_id] for token_id in ids], wanted=request(num_logprobs=0))
    shown = [token for delta in deltas for token in delta.tokens]
    assert b"".join(TOKENIZER.token_bytes(token.token.token_id) for token in shown) == "é🎉".encode()
    assert [delta.text for delta in deltas if delta.text] == ["é", "🎉"]


def test_the_rest_of_a_character_that_never_came_is_one_replacement() -> None:
    ids = TOKENIZER.encode("a🎉")[:-1]
    assert text_of(run([ids])) == "a\ufffd"


def test_hidden_tokens_are_counted_but_not_shown() -> None:
    choice = Choice(0, request(stop=StopRules(10, (EOS_ID,), stop_token_ids=(70,)), num_logprobs=0), TOKENIZER)
    shown = choice.push([Token(2, -1.0), Token(80, -1.0), Token(70, -1.0)])
    assert shown.text == TOKENIZER.text([80])
    assert [token.token.token_id for token in shown.tokens] == [80]
    assert choice.num_generated == 3


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    ids = TOKENIZER.encode("one, two, three")
    choice = Choice(0, request(), TOKENIZER, [","])
    delta = choice.push([Token(token_id) for token_id in ids])
    assert delta.text == "one"
    assert delta.finish_reason is FinishReason.STOP
    upto = next(n for n in range(len(ids)) if "," in TOKENIZER.text(ids[:n]))
    assert choice.num_generated == upto < len(ids)


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = TOKENIZER.encode("a,b,c")
    assert len(ids) == 5
    assert text_of(run([ids], [","], request(stop=StopRules(10, min_tokens=3)))) == "a,b"


def test_a_held_back_tail_comes_out_at_the_end() -> None:
    ids = TOKENIZER.encode("wait: ST")
    deltas = run([[token_id] for token_id in ids], ["STOP"])
    assert text_of(deltas) == "wait: ST"
    assert deltas[-1].text == "ST"


@pytest.mark.parametrize("at", [0.0, 12.5])
def test_times_of_the_first_and_last_token(at: float) -> None:
    choice = Choice(0, request(), TOKENIZER)
    choice.push([Token(80)], at)
    choice.push([Token(81)], at + 1)
    choice.push([Token(82)], at + 3)
    assert (choice.first_token_at, choice.last_token_at) == (at, at + 3)
