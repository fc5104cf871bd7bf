"""Which way of writing calls is a model's: asked of templates of the kinds that models ship."""

from __future__ import annotations

import pytest

from packlight.router.tools.formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    NEMOTRON,
    CallFormat,
    format_of,
    knows_system,
    marks_of,
)
from tests.unit.router.tools import templates
from tests.unit.router.tools.templates import PLAIN, TOLD, Templated


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (templates.HERMES, HERMES),
        (templates.MISTRAL, MISTRAL),
        (templates.NEMOTRON, NEMOTRON),
        (templates.LLAMA, LLAMA),
        (PLAIN, None),
        (templates.FOREIGN, None),
        (TOLD + PLAIN, None),  # it tells of tools and drops calls
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN, None),
        (TOLD + "{{ messages[2].content }}", None),
        ("", None),
    ],
)
def test_a_template_is_understood_by_what_it_writes(template: str, row: CallFormat | None) -> None:
    assert format_of(Templated(template)) is row


def test_marks_may_be_special_tokens() -> None:
    tokenizer = Templated(templates.MISTRAL, ["[TOOL_CALLS]"])
    assert format_of(tokenizer) is MISTRAL
    assert marks_of(MISTRAL, tokenizer) == {tokenizer.marks["[TOOL_CALLS]"]: "[TOOL_CALLS]"}
    assert marks_of(MISTRAL, Templated(templates.MISTRAL)) == {}


def test_whether_there_is_a_system_prompt() -> None:
    assert knows_system(Templated(PLAIN))
    assert not knows_system(Templated(templates.NO_SYSTEM))
