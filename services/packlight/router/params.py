"""From a typed body to what the engine is told: sampling, stop rules, seeds.

Knows the meaning of OpenAI's fields and the limits that the model sets. Pure.
"""

from __future__ import annotations

import hashlib
import struct

from packlight.core.errors import ContextLengthExceeded, InvalidRequest
from packlight.core.types import ModelSpec, SamplingParams, StopRules
from packlight.router.schema import Body


def sampling_params(body: Body, seed: int, model: ModelSpec, grammar: str = "") -> SamplingParams:
    """Raises InvalidRequest for a `logit_bias` key that is not a token of the model."""
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body, model.vocab_size),
        seed=seed,
        num_logprobs=body.num_logprobs,
        grammar=grammar,
    )


def stop_rules(body: Body, max_tokens: int, model: ModelSpec) -> StopRules:
    """Raises InvalidRequest for a stop token outside the vocabulary."""
    for index, token_id in enumerate(body.stop_token_ids):
        check_token_id(token_id, f"stop_token_ids[{index}]", model.vocab_size)
    return StopRules(
        max_tokens=max_tokens,
        eos_token_ids=model.eos_token_ids,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=min(body.min_tokens, max_tokens),
    )


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the first choice has the request's own, so it answers as `n = 1` would. 63 bits."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def answer_room(num_prompt_tokens: int, wanted: int | None, default: int, max_context: int, param: str) -> int:
    """How many tokens the answer may have: `wanted`, or `default` if the context has room for so many.

    Raises ContextLengthExceeded in the words that client frameworks look for."""
    limit = f"This model's maximum context length is {max_context} tokens."
    if num_prompt_tokens >= max_context:
        raise ContextLengthExceeded(
            f"{limit} However, your messages resulted in {num_prompt_tokens} tokens. "
            "Please reduce the length of the messages.",
            param=param,
        )
    if wanted is not None and num_prompt_tokens + wanted > max_context:
        raise ContextLengthExceeded(
            f"{limit} However, you requested {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the messages, "
            f"{wanted} in the completion). Please reduce the length of the messages or completion.",
            param=param,
        )
    return min(default, max_context - num_prompt_tokens) if wanted is None else wanted


def check_token_id(token_id: int, param: str, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise InvalidRequest(
            f"Invalid '{param}': integer above maximum value. Expected a token id < {vocab_size}, the vocabulary size.",
            param=param,
            code="integer_above_max_value",
        )


def _logit_bias(body: Body, vocab_size: int) -> tuple[tuple[int, float], ...]:
    bias = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"Invalid 'logit_bias': every key must be a token id from 0 to {vocab_size - 1}, written as a string.",
                param="logit_bias",
            )
        bias[int(key)] = value
    return tuple(sorted(bias.items()))
