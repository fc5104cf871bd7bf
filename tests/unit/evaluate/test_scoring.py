from __future__ import annotations

import pytest

from packlight.evaluate.scoring import all_match, leading_match


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        (" 1234567.", ("1234567",), 1.0),
        ("1234", ("1234567",), 0.0),
        ("", ("x",), 0.0),
        ("The words are Abbey and ACORN", ("abbey", "acorn", "album", "alley"), 0.5),
        ("7c20eb85-42C0", ("7C20EB85-42c0",), 1.0),
    ],
)
def test_all_match_is_the_share_of_references_said(answer: str, references: tuple[str, ...], score: float) -> None:
    assert all_match(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [([1, 2, 3, 9], [1, 2, 3], 1.0), ([1, 2], [1, 2, 3, 4], 0.5), ([1, 9, 3, 4], [1, 2, 3, 4], 0.25), ([], [1], 0.0)],
)
def test_leading_match_stops_at_the_first_difference(answer: list[int], reference: list[int], score: float) -> None:
    assert leading_match(answer, reference) == score
