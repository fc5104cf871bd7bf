"""Requests <-> protobuf messages.

Every message that arrives is foreign: a missing sub-message reads as its defaults, an unknown recipe is the receiver's
to refuse. Token ids travel as little-endian u32 arrays, because a prompt has thousands.
"""

from __future__ import annotations

import sys
from array import array

import numpy as np

from packlight.core.errors import InvalidRequest
from packlight.core.types import GenerateRequest, PackSpec, Pooling, PrefillRequest, SamplingParams, StopRules
from packlight.wire.presence import has
from packlight.wire.trace import trace_from_fields
from packlight.wire.v1 import common_pb2, decode_pb2, prefill_pb2

MAX_UINT32 = 2**32 - 1


def ids_to_bytes(token_ids: tuple[int, ...]) -> bytes:
    packed = array("I", token_ids)  # four times as fast as by way of numpy
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def ids_from_bytes(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, dtype="<u4").tolist())


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.Sampling:
    return common_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=min(sampling.top_k, MAX_UINT32),  # no vocabulary is larger: it keeps all, as the caller asked
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed & 0xFFFFFFFFFFFFFFFF,
        num_logprobs=sampling.num_logprobs,
        grammar=sampling.grammar,
    )


def sampling_from_proto(message: common_pb2.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        num_logprobs=message.num_logprobs if has(message, "num_logprobs") else None,
        grammar=message.grammar,
    )


def stop_to_proto(stop: StopRules) -> common_pb2.StopRules:
    return common_pb2.StopRules(
        max_tokens=stop.max_tokens,
        eos_token_ids=stop.eos_token_ids,
        stop_token_ids=stop.stop_token_ids,
        ignore_eos=stop.ignore_eos,
        min_tokens=stop.min_tokens,
    )


def stop_from_proto(message: common_pb2.StopRules) -> StopRules:
    return StopRules(
        max_tokens=message.max_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
    )


def pack_to_proto(pack: PackSpec) -> common_pb2.PackSpec:
    return common_pb2.PackSpec(
        recipe=pack.recipe,
        budget_tokens=pack.budget_tokens,
        ratio=pack.ratio,
        window=pack.window,
        sinks=pack.sinks,
        kernel=pack.kernel,
        pooling=pack.pooling,
        codec=pack.codec,
        params=dict(pack.params),
        mass_floor=pack.mass_floor,
    )


def pack_from_proto(message: common_pb2.PackSpec) -> PackSpec:
    return PackSpec(
        recipe=message.recipe,
        budget_tokens=message.budget_tokens if has(message, "budget_tokens") else None,
        ratio=message.ratio if has(message, "ratio") else None,
        window=message.window,
        sinks=message.sinks,
        kernel=message.kernel if has(message, "kernel") else None,
        pooling=_pooling(message.pooling),
        codec=message.codec if has(message, "codec") else None,
        params=tuple(sorted(message.params.items())),
        mass_floor=message.mass_floor,
    )


def _pooling(name: str) -> Pooling:
    """Raises InvalidRequest for a pooling that a newer release may have."""
    try:
        return Pooling(name or Pooling.MAX)
    except ValueError:
        raise InvalidRequest(f"unknown pooling {name!r}; choose one of {', '.join(Pooling)}") from None


def generate_to_proto(request: GenerateRequest) -> decode_pb2.GenerateRequest:
    return decode_pb2.GenerateRequest(
        request_id=request.request_id,
        token_ids=ids_to_bytes(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=sampling_to_proto(request.sampling),
        stop=stop_to_proto(request.stop),
        pack=pack_to_proto(request.pack),
        cache_salt=request.cache_salt,
        prefill_id=request.prefill_id,
        prefill_address=request.prefill_address,
        deadline_s=request.deadline_s,
        explain=request.explain,
        traceparent=request.trace.traceparent if request.trace else "",
        tracestate=request.trace.tracestate if request.trace else "",
    )


def generate_from_proto(message: decode_pb2.GenerateRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=message.request_id,
        token_ids=ids_from_bytes(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_proto(message.sampling),
        stop=stop_from_proto(message.stop),
        pack=pack_from_proto(message.pack),
        cache_salt=message.cache_salt,
        prefill_id=message.prefill_id,
        prefill_address=message.prefill_address,
        deadline_s=message.deadline_s,
        explain=message.explain,
        trace=trace_from_fields(message.traceparent, message.tracestate),
    )


def prefill_to_proto(request: PrefillRequest) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(
        request_id=request.request_id,
        token_ids=ids_to_bytes(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=sampling_to_proto(request.sampling),
        pack=pack_to_proto(request.pack),
        cache_salt=request.cache_salt,
        transports=request.transports,
        banned_token_ids=request.banned_token_ids,
        deadline_s=request.deadline_s,
        explain=request.explain,
    )


def prefill_from_proto(message: prefill_pb2.PrefillRequest) -> PrefillRequest:
    return PrefillRequest(
        request_id=message.request_id,
        token_ids=ids_from_bytes(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_proto(message.sampling),
        pack=pack_from_proto(message.pack),
        cache_salt=message.cache_salt,
        transports=tuple(message.transports),
        banned_token_ids=tuple(message.banned_token_ids),
        deadline_s=message.deadline_s,
        explain=message.explain,
    )
