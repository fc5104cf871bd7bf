"""Answers held to a grammar by a prefill and a decode worker: from the first token on, and when another takes over."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest

from packlight.core.errors import InvalidRequest
from packlight.core.types import Failed, Finished, FinishReason, SamplingParams
from packlight.models.fake import fake_answer
from packlight.models.fake_spec import FAKE_EOS
from packlight.models.grammar import json_grammar, regex_grammar
from tests.support.fake_pair import answer, collect, fake_pair, make_request

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def held(grammar: str, max_tokens: int = 64, *, temperature: float = 1.0, seed: int = 1, **kwargs):
    # The fake model wants one token, and all others equally little: only sampling makes an answer of many kinds.
    request = make_request(PROMPT, max_tokens, **kwargs)
    sampling = SamplingParams(temperature=temperature, seed=seed, grammar=grammar)
    return replace(request, sampling=sampling, stop=replace(request.stop, eos_token_ids=(FAKE_EOS,)))


@pytest.mark.parametrize("seed", range(4))
async def test_an_answer_matches_from_its_first_token_to_its_end(seed):
    async with fake_pair() as pair:
        tokens, event = await collect(pair.decode, held(regex_grammar("[a-f]{3,9}!"), seed=seed))
    assert isinstance(event, Finished)
    assert event.reason is FinishReason.STOP
    assert re.fullmatch(rb"[a-f]{3,9}!\0", bytes(tokens))


async def test_greedy_takes_what_the_model_wants_where_that_is_allowed():
    unheld = fake_answer(PROMPT, 8)
    async with fake_pair() as pair:
        assert await answer(pair.decode, held(regex_grammar("(?s:.)*"), 2, temperature=0.0)) == unheld[:2]
        tokens = await answer(pair.decode, held(regex_grammar("[b-c]{4}"), 4, temperature=0.0))
    assert tokens == [ord("b")] * 4  # it wants others, so the lowest of equals


async def test_who_takes_over_goes_on_as_if_unbroken():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
    }
    grammar = json_grammar(schema | {"additionalProperties": False})
    async with fake_pair() as pair:
        whole = await answer(pair.decode, held(grammar, 40))
        for cut in range(1, len(whole)):
            rest = await answer(pair.decode, held(grammar, 40, resumed=whole[:cut]))
            assert whole[:cut] + rest == whole
    if whole[-1] == FAKE_EOS:
        assert set(json.loads(bytes(whole[:-1]))) == {"a", "b"}


async def test_who_is_held_does_not_disturb_who_is_not():
    async with fake_pair() as pair:
        requests = [
            make_request(PROMPT, 12, request_id="free"),
            held(regex_grammar("[0-9]{12}"), 12, request_id="held"),
        ]
        free, digits = await asyncio.gather(*(answer(pair.decode, request) for request in requests))
    assert free == fake_answer(PROMPT, 12)
    assert re.fullmatch(rb"[0-9]{12}", bytes(digits))


async def test_a_grammar_in_which_nothing_can_come_is_the_requests_fault_and_harms_no_other():
    async with fake_pair() as pair:
        (_, event), free = await asyncio.gather(
            collect(pair.decode, held(json_grammar({"$ref": "#"}), request_id="endless")),
            answer(pair.decode, make_request(PROMPT, 12, request_id="free")),
        )
    assert isinstance(event, Failed)
    assert isinstance(event.error, InvalidRequest)
    assert "no answer can be held to the grammar" in str(event.error)
    assert free == fake_answer(PROMPT, 12)
