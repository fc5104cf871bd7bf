"""docs/api.md tells of every field that the server knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from packlight.router import validate
from packlight.router.schema import ChatBody, CompletionBody

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
FIELDS = {*ChatBody.model_fields, *CompletionBody.model_fields, *validate._UNSUPPORTED, *validate._ACCEPTED}


@pytest.fixture(scope="module")
def words() -> set[str]:
    return set(re.findall(r"`([a-z_]+)\b", PAGE.read_text()))


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_field_that_is_known_is_told_of(field: str, words: set[str]) -> None:
    assert field in words
