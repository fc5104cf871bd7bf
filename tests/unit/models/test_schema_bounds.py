"""Schemas that would end the process that compiles them, and their neighbours that do not.

Every refused schema of the first two lists was seen to kill a process with SIGSEGV."""

from __future__ import annotations

from typing import Any

import pytest

from packlight.core.errors import InvalidRequest
from packlight.models.grammar import check_grammar, json_grammar, json_of, lark_grammar
from packlight.models.schema_bounds import MAX_LEVELS, MAX_PATTERN_CHARS, MAX_PROPERTIES, check_schema

LOWEST = -(2**63)

# Ways in which a definition leads to the next one, each with the levels that it adds.
LINKS = {
    "plain": (1, lambda reference: reference),
    "anyOf": (3, lambda reference: {"anyOf": [reference]}),
    "allOf": (3, lambda reference: {"allOf": [reference]}),
    "items": (2, lambda reference: {"type": "array", "items": reference}),
    "properties": (3, lambda reference: {"type": "object", "properties": {"a": reference}, "required": ["a"]}),
}


def chain(link: str, num_levels: int) -> dict[str, Any]:
    """A schema of definitions that lead `num_levels` levels deep, or a few less."""
    per_link, definition = LINKS[link]
    num_links = (num_levels - 4) // per_link
    links = {f"d{at}": definition({"$ref": f"#/$defs/d{at + 1}"}) for at in range(num_links)}
    return {"$defs": links | {f"d{num_links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("link", LINKS)
def test_references_lead_so_deep_and_no_deeper(link: str) -> None:
    per_link, _ = LINKS[link]
    assert check_grammar(json_grammar(chain(link, MAX_LEVELS - per_link))) == []
    with pytest.raises(InvalidRequest, match=f"levels deep, the limit is {MAX_LEVELS}"):
        json_grammar(chain(link, MAX_LEVELS + 3 * per_link))


def test_a_definition_counts_once_however_often_it_is_meant() -> None:
    check_schema({"$defs": {"a": {"type": "string"}}, "anyOf": [{"$ref": "#/$defs/a"}] * 2 * MAX_LEVELS})
    check_schema({"type": "object", "properties": {"next": {"$ref": "#"}}})


def test_what_a_reference_means_may_lie_anywhere() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"items": deep}
    references = [{"$ref": f"other.json#{at}"} for at in range(20)]
    with pytest.raises(InvalidRequest, match="levels deep"):
        check_schema({"$defs": {"a~/b": deep}, "anyOf": references})
    check_schema({"$defs": {"a~/b": deep}, "anyOf": [{"$ref": "#/$defs/a~0~1b"}, {"$ref": "#/%24defs/a~0~1b"}]})


@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(LOWEST, LOWEST + 5), (LOWEST + 1, LOWEST + 5), (LOWEST, LOWEST), (-1e300, LOWEST), (-9.3e18, LOWEST + 5)],
)
def test_ranges_of_integers_end_before_64_bits_do(lowest: float, highest: float) -> None:
    with pytest.raises(InvalidRequest, match="64 bits"):
        json_grammar({"type": "integer", "minimum": lowest, "maximum": highest})


def test_the_lowest_range_that_is_taken_can_be_compiled() -> None:
    lowest = {"type": "integer", "minimum": LOWEST + 1024, "maximum": LOWEST + 1024}
    assert check_grammar(json_grammar(lowest)) == []
    assert check_grammar(json_grammar({"type": "integer", "minimum": 0, "maximum": 2**64 - 1})) == []


@pytest.mark.parametrize("number", [2**64, -(2**64), 10**300])
def test_numbers_that_the_compiler_has_no_type_for(number: int) -> None:
    for schema in ({"const": number}, {"items": {"enum": ["a", number]}}):
        with pytest.raises(InvalidRequest, match="64 bits"):
            json_grammar(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a?" * MAX_PATTERN_CHARS},
        {"anyOf": [{"type": "object", "patternProperties": {"a?" * MAX_PATTERN_CHARS: {"type": "string"}}}]},
    ],
)
def test_patterns_are_not_endless(schema: dict[str, Any]) -> None:
    for write in (json_grammar, json_of):
        with pytest.raises(InvalidRequest, match=f"pattern of {2 * MAX_PATTERN_CHARS} characters, the limit is"):
            write(schema)


def test_an_object_has_no_thousands_of_properties() -> None:
    schema = {"type": "object", "properties": {f"p{number}": {} for number in range(MAX_PROPERTIES)}}
    assert check_grammar(json_grammar(schema)) == []
    schema["properties"]["one too many"] = {}
    with pytest.raises(InvalidRequest, match="object of 1001 properties, the limit is 1000"):
        json_grammar({"items": schema})


@pytest.mark.parametrize("number", [10_001, 999_983, 2**31, -(2**31), 10_000.1, 1e300])
def test_a_multiple_is_not_followed_through_millions_of_remainders(number: float) -> None:
    with pytest.raises(InvalidRequest, match=r"common multiple .*, the limit is 10000"):
        json_grammar({"type": "number", "multipleOf": number})


def test_multiples_of_one_number_may_be_asked_for_in_several_places() -> None:
    with pytest.raises(InvalidRequest, match="common multiple 854667"):
        json_grammar({"multipleOf": 99, "allOf": [{"multipleOf": 97}, {"type": "integer", "multipleOf": 89}]})
    with pytest.raises(InvalidRequest, match="counted in units of 1e-2, the limit"):
        json_grammar({"type": "number", "multipleOf": 0.01, "allOf": [{"multipleOf": 101}]})


@pytest.mark.parametrize("numbers", [(10_000,), (0.01, 0.25, 5, 100), (1e-9,), (-7,)])
def test_multiples_that_people_ask_for(numbers: tuple[float, ...]) -> None:
    parts = {f"p{at}": {"type": "number", "multipleOf": number} for at, number in enumerate(numbers)}
    assert check_grammar(json_grammar({"type": "object", "properties": parts})) == []


def test_properties_may_have_the_names_of_keywords() -> None:
    names = {"pattern": {"type": "string"}, "$ref": {"type": "string"}, "patternProperties": {"type": "boolean"}}
    assert check_grammar(json_grammar({"type": "object", "properties": names})) == []


def test_a_schema_within_a_rule_may_have_any_character() -> None:
    rule = json_of({"enum": ["\x7f", "\x00", "\u2028"]})
    assert check_grammar(lark_grammar(f"start: {rule}")) == []
