"""Events and errors <-> protobuf messages.

Every message that arrives is foreign: an event of an unknown kind is a ShipmentIncompatible of a shipment and ends an
answer, an unknown error is an InternalError.
"""

from __future__ import annotations

from dataclasses import asdict, fields

from packlight.core.errors import InternalError, PacklightError, ShipmentIncompatible, error_classes
from packlight.core.shipping import Accepted, Chunk, FirstToken, LayerHeader, PrefillEvent, Shipped, Waiting
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    KVUsage,
    Progress,
    RequestId,
    Timings,
    Token,
    Tokens,
    Usage,
)
from packlight.wire.kept_map import kept_map_from_proto, kept_map_to_proto
from packlight.wire.presence import has
from packlight.wire.v1 import common_pb2, decode_pb2, prefill_pb2

# ── events of a prefill stream ───────────────────────────────────────────────────────────────────────────────────────


def prefill_event_to_proto(event: Waiting | Accepted | LayerHeader | FirstToken | Shipped) -> prefill_pb2.PrefillEvent:
    match event:
        case Waiting():
            return prefill_pb2.PrefillEvent(waiting=prefill_pb2.Waiting())
        case Accepted():
            accepted = prefill_pb2.Accepted(compatibility=event.compatibility, manifest=event.manifest)
            return prefill_pb2.PrefillEvent(accepted=accepted)
        case LayerHeader():
            layer = prefill_pb2.LayerHeader(
                layer=event.layer,
                lengths=event.lengths,
                num_bytes=event.num_bytes,
                checksum=event.checksum,
                offset=event.offset,
            )
            return prefill_pb2.PrefillEvent(layer=layer)
        case FirstToken():
            first = prefill_pb2.FirstToken(token=token_to_proto(event.token), num_cached_tokens=event.num_cached_tokens)
            return prefill_pb2.PrefillEvent(first_token=first)
        case Shipped():
            return prefill_pb2.PrefillEvent(shipped=_shipped_to_proto(event))


def prefill_event_from_proto(message: prefill_pb2.PrefillEvent) -> PrefillEvent:
    match message.WhichOneof("event"):
        case "waiting":
            return Waiting()
        case "accepted":
            return Accepted(message.accepted.compatibility, message.accepted.manifest)
        case "layer":
            layer = message.layer
            offset = layer.offset if has(layer, "offset") else None
            return LayerHeader(layer.layer, tuple(layer.lengths), layer.num_bytes, layer.checksum, offset)
        case "first_token":
            first = message.first_token
            return FirstToken(token_from_proto(first.token), first.num_cached_tokens)
        case "shipped":
            return _shipped_from_proto(message.shipped)
        case "chunk":
            return Chunk(message.chunk)
        case other:
            raise ShipmentIncompatible(f"the prefill worker sent an event of an unknown kind ({other}): other release?")


def _shipped_to_proto(event: Shipped) -> prefill_pb2.Shipped:
    return prefill_pb2.Shipped(
        num_layers=event.num_layers,
        shipped_bytes=event.shipped_bytes,
        exact_bytes=event.exact_bytes,
        num_kept_tokens=event.num_kept_tokens,
        retained_mass=event.retained_mass,
        queue_s=event.queue_s,
        prefill_s=event.prefill_s,
        select_s=event.select_s,
        num_grown_tokens=event.num_grown_tokens,
        kept_map=kept_map_to_proto(event.kept_map),
        ship_s=event.ship_s,
    )


def _shipped_from_proto(message: prefill_pb2.Shipped) -> Shipped:
    return Shipped(
        num_layers=message.num_layers,
        shipped_bytes=message.shipped_bytes,
        exact_bytes=message.exact_bytes,
        num_kept_tokens=message.num_kept_tokens,
        retained_mass=message.retained_mass if has(message, "retained_mass") else None,
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        select_s=message.select_s,
        num_grown_tokens=message.num_grown_tokens,
        kept_map=kept_map_from_proto(message.kept_map) if has(message, "kept_map") else None,
        ship_s=message.ship_s,
    )


# ── events of an answer ──────────────────────────────────────────────────────────────────────────────────────────────


def token_to_proto(token: Token) -> common_pb2.Token:
    top = [common_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in token.top_logprobs]
    return common_pb2.Token(token_id=token.token_id, logprob=token.logprob, top_logprobs=top)


def token_from_proto(message: common_pb2.Token) -> Token:
    return Token(
        message.token_id,
        message.logprob if has(message, "logprob") else None,
        tuple((top.token_id, top.logprob) for top in message.top_logprobs),
    )


def event_to_proto(event: GenerateEvent) -> decode_pb2.Event:
    match event:
        case Tokens():
            tokens = decode_pb2.Tokens(tokens=[token_to_proto(token) for token in event.tokens])
            return decode_pb2.Event(request_id=event.request_id, tokens=tokens)
        case Progress():
            return decode_pb2.Event(request_id=event.request_id, progress=usage_to_proto(event.usage))
        case Finished():
            finished = decode_pb2.Finished(reason=event.reason.value, usage=usage_to_proto(event.usage))
            return decode_pb2.Event(request_id=event.request_id, finished=finished)
        case Failed():
            return decode_pb2.Event(request_id=event.request_id, failed=error_to_proto(event.error))


def event_from_proto(message: decode_pb2.Event) -> GenerateEvent:
    match message.WhichOneof("event"):
        case "tokens":
            return Tokens(message.request_id, tuple(token_from_proto(token) for token in message.tokens.tokens))
        case "progress":
            return Progress(message.request_id, usage_from_proto(message.progress))
        case "finished":
            return _finished_from_proto(message.request_id, message.finished)
        case "failed":
            return Failed(message.request_id, error_from_proto(message.failed))
        case other:
            return _not_understood(message.request_id, f"an event of an unknown kind ({other})")


def _finished_from_proto(request_id: RequestId, message: decode_pb2.Finished) -> Finished | Failed:
    try:
        reason = FinishReason(message.reason)
    except ValueError:
        return _not_understood(request_id, f"an unknown reason to finish ({message.reason!r})")
    return Finished(request_id, reason, usage_from_proto(message.usage))


def _not_understood(request_id: RequestId, what: str) -> Failed:
    """It costs this answer, not the stream and the other answers on it."""
    return Failed(request_id, InternalError(f"the decode worker sent {what}: does it run another release?"))


def usage_to_proto(usage: Usage) -> decode_pb2.Usage:
    kv = usage.kv
    return decode_pb2.Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_generated_tokens=usage.num_generated_tokens,
        kv=decode_pb2.KVUsage(
            recipe=kv.recipe,
            num_kept_tokens=kv.num_kept_tokens,
            shipped_bytes=kv.shipped_bytes,
            exact_bytes=kv.exact_bytes,
            retained_mass=kv.retained_mass,
            codec=kv.codec,
            num_grown_tokens=kv.num_grown_tokens,
            num_read_tokens=kv.num_read_tokens,
            kept_map=kept_map_to_proto(kv.kept_map),
        ),
        timings=decode_pb2.Timings(**asdict(usage.timings)),
    )


def usage_from_proto(message: decode_pb2.Usage) -> Usage:
    kv = message.kv
    return Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_generated_tokens=message.num_generated_tokens,
        kv=KVUsage(
            recipe=kv.recipe,
            num_kept_tokens=kv.num_kept_tokens,
            shipped_bytes=kv.shipped_bytes,
            exact_bytes=kv.exact_bytes,
            retained_mass=kv.retained_mass if has(kv, "retained_mass") else None,
            codec=kv.codec,
            num_grown_tokens=kv.num_grown_tokens,
            num_read_tokens=kv.num_read_tokens,
            kept_map=kept_map_from_proto(kv.kept_map) if has(kv, "kept_map") else None,
        ),
        timings=Timings(**{field.name: getattr(message.timings, field.name) for field in fields(Timings)}),
    )


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_to_proto(error: PacklightError) -> common_pb2.Error:
    return common_pb2.Error(
        kind=type(error).__name__,
        message=error.message,
        param=error.param,
        code=error.code,
        retry_after_s=error.retry_after_s,
        worker_id=error.worker_id,
    )


def error_from_proto(message: common_pb2.Error) -> PacklightError:
    cls = error_classes().get(message.kind) or error_classes()["InternalError"]
    return cls(
        message.message,
        param=message.param if has(message, "param") else None,
        code=message.code or None,
        retry_after_s=message.retry_after_s if has(message, "retry_after_s") else None,
        worker_id=message.worker_id if has(message, "worker_id") else None,
    )
