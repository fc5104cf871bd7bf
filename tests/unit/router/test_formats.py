"""`response_format` and `structured_outputs` over HTTP: what the workers are told, and what the client is warned of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.router_harness import CHAT, COMPLETIONS, MODEL, Harness, chat_body
from tests.support.scripted_backend import one_by_one

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANSWER = one_by_one([80])


def named(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **fields}}


async def grammar_of(path: str, body: dict[str, Any]) -> str:
    harness = Harness(ANSWER)
    async with harness.client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert "warning" not in response.headers
    grammars = {request.sampling.grammar for request in harness.backend.requests}
    assert len(grammars) == 1
    return grammars.pop()


async def test_without_a_format_nobody_is_held_to_anything():
    assert await grammar_of(CHAT, chat_body()) == ""
    assert await grammar_of(CHAT, chat_body(response_format={"type": "text"})) == ""


async def test_a_schema_reaches_the_workers_of_every_choice():
    grammar = await grammar_of(CHAT, chat_body(response_format=named(SCHEMA), n=2))
    assert json.loads(grammar)["grammars"][0]["json_schema"]["properties"] == SCHEMA["properties"]


async def test_an_object_is_any_object():
    by_type = await grammar_of(CHAT, chat_body(response_format={"type": "json_object"}))
    assert json.loads(by_type)["grammars"][0]["json_schema"]["type"] == "object"


async def test_what_is_null_in_a_format_is_not_given():
    nulls = {"strict": None, "description": None}
    grammar = await grammar_of(CHAT, chat_body(response_format=named(SCHEMA, **nulls)))
    assert grammar == await grammar_of(CHAT, chat_body(response_format=named(SCHEMA)))
    any_object = {"type": "json_schema", "json_schema": {"name": "thing", "schema": None}}
    assert "json_schema" in await grammar_of(CHAT, chat_body(response_format=any_object))


@pytest.mark.parametrize(
    ("wanted", "part"),
    [({"json": SCHEMA}, '"integer"'), ({"regex": "a+b"}, "a+b"), ({"choice": ["yes", "no"]}, '"yes" | "no"')],
)
async def test_other_servers_names_for_it_work_on_both_paths(wanted, part):
    assert part in await grammar_of(CHAT, chat_body(structured_outputs=wanted))
    body = {"model": MODEL, "prompt": "a", "structured_outputs": wanted}
    assert part in await grammar_of(COMPLETIONS, body)


async def test_a_completion_is_held_to_a_schema_as_a_chat_is():
    body = {"model": MODEL, "prompt": "a", "response_format": named(SCHEMA)}
    assert '"integer"' in await grammar_of(COMPLETIONS, body)


async def test_what_a_loose_schema_leaves_out_is_said_in_a_header():
    harness = Harness(ANSWER)
    wanted = named(SCHEMA | {"not": {"type": "string"}, 'odd"\n\\ø': 1})
    async with harness.client() as client:
        response = await client.post(CHAT, json=chat_body(response_format=wanted, nonsense=1))
    assert response.status_code == 200
    warning = response.headers["warning"]
    assert warning.startswith(
        '299 packlight "ignored unknown parameters: nonsense", 299 packlight "the answer is not held'
    )
    assert "'not'" in warning
