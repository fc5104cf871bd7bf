"""Answers that are held to a grammar, token by token, over vocabularies that are spelled out here."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import InternalError, InvalidRequest
from packlight.models.fake_spec import FAKE_EOS, FakeTokenizer, fake_spec
from packlight.models.grammar import (
    MAX_GRAMMAR_CHARS,
    Grammars,
    check_grammar,
    choice_grammar,
    constraint_of,
    json_grammar,
    open_grammars,
    regex_grammar,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "maximum": 150, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Pieces:
    """A vocabulary of a few words: id 0 ends, id 1 is another end, the last two logits have no token."""

    WORDS = (b"", b"", b"{", b"}", b'{"a": ', b'"a": ', b"1", b"12", b", ", b"<|end|>")

    def token_bytes(self, token_id: int) -> bytes:
        return self.WORDS[token_id] if token_id < len(self.WORDS) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in (0, 1, 9)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [self.WORDS.index(bytes([byte])) for byte in text.encode()]


@cache
def bytewise() -> Grammars:
    grammars = open_grammars(FakeTokenizer(), fake_spec())
    assert grammars is not None
    return grammars


def allowed(grammar: str, text: str) -> set[str]:
    """The characters that may follow `text`; "" is the end."""
    mask = bytewise().follow(grammar, text.encode()).allowed()
    return {"" if token_id == FAKE_EOS else chr(token_id) for token_id in np.flatnonzero(mask)}


def test_only_what_the_grammar_has_may_come():
    grammar = regex_grammar("ab|cd*")
    assert allowed(grammar, "") == {"a", "c"}
    assert allowed(grammar, "a") == {"b"}
    assert allowed(grammar, "ab") == {""}
    assert allowed(grammar, "cd") == {"d", ""}


def test_a_choice_is_taken_literally():
    choices = ['say "a|b"', "say\nno", "ø", "\x7f"]
    grammar = choice_grammar(choices)
    assert check_grammar(grammar) == []
    for choice in choices:
        assert "" in allowed(grammar, choice)
    assert allowed(grammar, "say") == {" ", "\n"}


def test_json_has_the_spacing_that_models_write():
    grammar = json_grammar(PERSON)
    assert allowed(grammar, "") == {"{"}
    assert allowed(grammar, '{"name":') == {" "}
    assert allowed(grammar, '{"name": "Bob",') == {" "}
    assert "" in allowed(grammar, '{"name": "Bob", "age": 42}')
    assert "" not in allowed(grammar, '{"name": "Bob", "age": 42')


def test_tokens_of_many_characters_and_logits_without_tokens():
    grammars = Grammars(Pieces(), 12, (0, 1))
    constraint = grammars.follow(json_grammar({"type": "object", "additionalProperties": {"type": "integer"}}))
    assert np.flatnonzero(constraint.allowed()).tolist() == [2, 4]  # "{" and '{"a": '
    constraint.add(4)
    assert np.flatnonzero(constraint.allowed()).tolist() == [6, 7]
    constraint.add(7)
    assert np.flatnonzero(constraint.allowed()).tolist() == [3, 6, 7, 8]
    constraint.add(3)
    assert np.flatnonzero(constraint.allowed()).tolist() == [0, 1]  # either end; never the special token 9


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_is_drawn_the_answer_is_of_the_schema_and_a_replay_allows_the_same(data):
    grammar, text = json_grammar(PERSON), b""
    constraint = bytewise().follow(grammar)
    while True:
        mask = constraint.allowed()
        replayed = bytewise().follow(grammar, text).allowed()
        assert (mask == replayed).all()
        # Characters beyond ASCII are half a character each; quotes come often enough to end strings.
        ids = [int(token_id) for token_id in np.flatnonzero(mask) if token_id < 128]
        token_id = data.draw(st.sampled_from(ids))
        if token_id == FAKE_EOS:
            break
        constraint.add(token_id)
        text += bytes([token_id])
    person = json.loads(text)
    assert set(person) == {"name", "age"}
    assert len(person["name"]) <= 9
    assert 0 <= person["age"] <= 150


def test_what_nothing_can_follow_is_refused_with_the_reason():
    for grammar, reason in (
        (regex_grammar("(a"), "unclosed group"),
        (regex_grammar("(?=a)b"), "look-around"),
        (json_grammar({"type": "strin"}), "Invalid type: strin"),
        (json_grammar({"not": {}}), 'Unimplemented keys: ["not"]'),
        (json_grammar({"$ref": "http://example.com/x"}), "example.com"),
        (regex_grammar("a" * MAX_GRAMMAR_CHARS), "limit"),
    ):
        with pytest.raises(InvalidRequest, match=re.escape(reason)):
            check_grammar(grammar)


@pytest.mark.parametrize("pattern", [r"(\w)|(é|\w)", r"((é|\w)|\w)", r"((\w|\d)|\w)"])
def test_a_panic_of_the_library_is_an_error_of_ours(pattern: str) -> None:
    """Refused by llguidance 1.9, which panics over them; another release may take them."""
    with suppress(InvalidRequest):
        check_grammar(regex_grammar(pattern))
    with suppress(InvalidRequest, InternalError):
        assert bytewise().follow(regex_grammar(pattern)).allowed().any()


def test_what_is_no_panic_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def interrupted(grammar: str) -> None:
        raise KeyboardInterrupt

    def panicking(grammar: str) -> None:
        raise PanicException

    matcher = "packlight.models.grammar.LLMatcher.validate_grammar_with_warnings"
    monkeypatch.setattr(matcher, interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_grammar("")
    monkeypatch.setattr(matcher, panicking)
    with pytest.raises(InvalidRequest, match="another way"):
        check_grammar("")


def test_a_lenient_schema_says_what_it_leaves_out():
    assert check_grammar(json_grammar({"type": "integer", "not": {}}, is_lenient=True)) == [
        'Unimplemented keys: ["not"]'
    ]
    assert check_grammar(json_grammar(PERSON, is_lenient=True)) == []


def test_a_token_that_was_not_allowed_is_an_error_from_then_on():
    constraint = bytewise().follow(regex_grammar("ab"))
    constraint.add(ord("x"))
    for _ in range(2):
        with pytest.raises(InternalError, match="grammar"):
            constraint.allowed()


def test_a_grammar_in_which_nothing_can_come_first_is_a_bad_request():
    with pytest.raises(InvalidRequest, match="no answer can be held to the grammar"):
        bytewise().follow(json_grammar({"$ref": "#"})).allowed()


def test_a_model_without_an_end_has_no_grammars():
    assert open_grammars(FakeTokenizer(), replace(fake_spec(), eos_token_ids=())) is None
    assert constraint_of(None, "", ()) is None
    with pytest.raises(InvalidRequest, match="no end token"):
        constraint_of(None, regex_grammar("a"), ())
