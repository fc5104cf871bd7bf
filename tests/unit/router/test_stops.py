from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.router.stops import StopFinder


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: the match that ends first, then the one listed first."""
    matches = [
        (text.index(stop) + len(stop), position, text.index(stop))
        for position, stop in enumerate(stops)
        if stop in text
    ]
    return (text[: min(matches)[2]], True) if matches else (text, False)


def search(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    shown = "".join(finder.push(piece) for piece in pieces)
    return shown + finder.flush(), finder.matched


@st.composite
def _texts_in_pieces(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Few letters, so that partial and overlapping matches are common."""
    pieces = draw(st.lists(st.text("ab", max_size=6), max_size=12))
    stops = draw(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
    return pieces, stops


@given(_texts_in_pieces())
def test_pieces_do_not_change_what_is_found(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    assert search(pieces, stops) == cut("".join(pieces), stops)


@given(_texts_in_pieces())
def test_no_more_is_held_back_than_could_become_a_stop_string(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    finder, fed, shown = StopFinder(stops), "", ""
    for piece in pieces:
        shown += finder.push(piece)
        fed += piece
        if finder.matched:
            return
        held = fed[len(shown) :]
        assert fed == shown + held
        longest = max((n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0)
        assert len(held) == longest


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["###"], "a##b###c", "a##b"),
        (["aab"], "aaab", "a"),
        (["b", "ab"], "xab", "xa"),
        (["ab", "b"], "xab", "x"),
        (["abcd", "bc"], "abcd", "a"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["🎉"], "yes 🎉 no", "yes "),
    ],
)
def test_examples(stops: list[str], text: str, shown: str) -> None:
    assert search(list(text), stops) == (shown, True)


def test_nothing_comes_after_a_match() -> None:
    finder = StopFinder(["x"])
    assert finder.push("ax") == "a"
    assert finder.push("b") == ""
    assert finder.flush() == ""


def test_an_unfinished_stop_string_is_shown_at_the_end() -> None:
    finder = StopFinder(["STOP"])
    assert finder.push("ST") == ""
    assert finder.flush() == "ST"
    assert not finder.matched
