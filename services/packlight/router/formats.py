"""From `response_format` and `structured_outputs` to the grammar that workers hold the answer to.

Knows what the two fields mean and what they cannot be combined with. How a grammar is written and followed is
`models/grammar.py`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from packlight.core.errors import InvalidRequest
from packlight.core.types import ModelSpec
from packlight.models.grammar import check_grammar, choice_grammar, json_grammar, regex_grammar
from packlight.router.schema import Body, JsonSchema, StructuredOutputs

ANY_OBJECT = {"type": "object"}
# Writes one, when all else about a request is settled.
Grammar = Callable[[], str]


@dataclass(frozen=True, slots=True)
class Format:
    """`grammar` as in `SamplingParams`. `loosened` says what of a schema that is not strict the answer is not held
    to."""

    grammar: str = ""
    loosened: tuple[str, ...] = ()


def answer_format(body: Body, spec: ModelSpec, *, is_reasoning: bool) -> Format:
    """Raises InvalidRequest for a format that cannot be held to, and for wishes that contradict it."""
    wanted = body.response_format
    if body.structured_outputs is not None:
        if wanted.type != "text":
            raise refusal("Use either 'response_format' or 'structured_outputs'.", "structured_outputs")
        param, grammar = _structured(body.structured_outputs)
    elif wanted.type == "text":
        return Format()
    elif wanted.json_schema is None:
        param, grammar = "response_format", partial(json_grammar, ANY_OBJECT)
    else:
        param, grammar = "response_format.json_schema.schema", _schema(wanted.json_schema)
    refuse_contradictions(body, spec, param.partition(".")[0], is_reasoning)
    return _checked(grammar, param)


def _schema(json_schema: JsonSchema) -> Grammar:
    return partial(json_grammar, json_schema.wanted or ANY_OBJECT, is_lenient=not json_schema.strict)


def _structured(wanted: StructuredOutputs) -> tuple[str, Grammar]:
    """Where it stands, and its grammar."""
    if wanted.json_ is not None:
        return "structured_outputs.json", partial(json_grammar, wanted.json_)
    if wanted.regex is not None:
        return "structured_outputs.regex", partial(regex_grammar, wanted.regex)
    return "structured_outputs.choice", partial(choice_grammar, wanted.choice or ())


def _checked(write: Grammar, param: str) -> Format:
    try:
        grammar = write()
        return Format(grammar, tuple(check_grammar(grammar)))
    except InvalidRequest as error:
        raise refusal(f"Invalid '{param}': {error.message}", param) from None


def refuse_contradictions(body: Body, spec: ModelSpec, param: str, is_reasoning: bool) -> None:
    """Raises InvalidRequest for a body that asks for more than the grammar that `param` asks for allows."""
    if not spec.eos_token_ids:
        raise refusal(f"'{param}' needs a model that ends its answers, and this one names no end token.", param)
    if is_reasoning:
        raise refusal(
            f"'{param}' cannot be held to by a model that thinks first: add "
            '"chat_template_kwargs": {"enable_thinking": false}.',
            param,
        )
    for name, is_given in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens > 0)):
        if is_given:
            raise refusal(f"'{name}' cannot be combined with '{param}', which says where the answer ends.", name)


def refusal(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
