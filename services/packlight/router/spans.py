"""What a trace says of one request on the router.

chat MODEL                     the HTTP request, to its last byte (`text_completion MODEL` for plain completions)
├─ prepare                     reading it: JSON, limits, template, tokens
├─ route                       looking the prefix up and choosing workers; once per choice and attempt
└─ attempt                     one try at a pair of workers, see `decode/spans.py` for what is below

Names are those of OpenTelemetry's semantic conventions for HTTP servers and generative AI where there are any, and
`packlight.` else. A stop string is the client's text and is left out, as prompts and answers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.types import Scope

from packlight.core.types import Failed, Finished, GenerateEvent, GenerateRequest
from packlight.router.choice import Choice
from packlight.router.errors import Outcome, Problem
from packlight.router.job import Job
from packlight.router.placement import Pair
from packlight.router.usage import usage_report
from packlight.telemetry.traces import Attributes, Kind, Span, SpanError, Tracer, span_error
from packlight.wire.trace import TRACEPARENT, TRACESTATE, trace_of

OPERATIONS: Mapping[str, str] = {"chat": "chat", "completions": "text_completion"}
_HEADERS: Mapping[bytes, str] = {name.encode(): name for name in (TRACEPARENT, TRACESTATE)}


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a request. `status` is HTTP's; `first_token_s` counts from the request's start."""

    request_id: str
    answer_id: str
    model: str
    outcome: Outcome
    status: int
    problem: Problem | None
    job: Job | None
    choices: Sequence[Choice]
    prepare_s: float
    first_token_s: float | None


def start_answer(tracer: Tracer, scope: Scope, dialect: str, model: str) -> Span:
    """Continues the caller's trace if it sent one."""
    headers = ((_HEADERS[name], value.decode("latin-1")) for name, value in scope["headers"] if name in _HEADERS)
    operation = OPERATIONS[dialect]
    span = tracer.start(f"{operation} {model}", trace_of(headers), kind=Kind.SERVER)
    if span.is_recording:
        host, port = scope.get("server") or (None, None)
        span.set(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "packlight",
                "http.request.method": scope["method"],
                "http.route": scope["path"],
                "server.address": host,
                "server.port": port,
            }
        )
    return span


def end_answer(span: Span, told: Told) -> None:
    if not span.is_recording:
        return
    span.set(
        {
            "http.response.status_code": told.status,
            "packlight.request.id": told.request_id,
            "packlight.outcome": told.outcome.value,
        }
    )
    if told.job is not None:
        span.set({**_asked(told.job.requests[0], told.job), **_answered(told, told.job)})
        span.set({"gen_ai.request.model": told.model, "gen_ai.response.model": told.model})
    problem = told.problem
    span.end(SpanError(problem.kind, problem.message, problem.status >= 500) if problem else None)


def _asked(request: GenerateRequest, job: Job) -> Attributes:
    sampling = request.sampling
    return {
        "gen_ai.request.choice.count": len(job.requests) if len(job.requests) > 1 else None,
        "gen_ai.request.stream": job.stream,
        "gen_ai.request.max_tokens": request.stop.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
    }


def _answered(told: Told, job: Job) -> Attributes:
    report = usage_report(job, told.choices, told.prepare_s)
    reasons = [choice.ending for choice in told.choices if choice.ending is not None]
    return {
        "gen_ai.response.id": told.answer_id,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": told.first_token_s,
        "gen_ai.usage.input_tokens": report["prompt_tokens"],
        "gen_ai.usage.output_tokens": report["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": report["prompt_tokens_details"]["cached_tokens"],
        **_packed(report["kv"] or {}),
    }


def _packed(kv: Attributes) -> Attributes:
    """One by one: what else the report may hold shows text of the prompt."""
    names = {
        "recipe": "recipe",
        "codec": "codec",
        "reason": "reason",
        "kept_tokens": "kept_tokens",
        "grown_tokens": "grown_tokens",
        "shipped_bytes": "shipped_bytes",
        "exact_bytes": "exact_bytes",
        "attention_mass_retained": "attention_mass",
    }
    return {f"packlight.{name}": kv.get(field) for field, name in names.items()}


# ── of one choice ────────────────────────────────────────────────────────────────────────────────────────────────────


def tell_route(span: Span, request: GenerateRequest, pair: Pair) -> None:
    if span.is_recording:
        span.set(
            {
                **_pair(pair),
                "packlight.choice.id": request.request_id,
                "packlight.reason": pair.reason.value,
                "packlight.predicted_ttft_s": pair.ttft_s,
                "gen_ai.usage.cache_read.input_tokens": pair.num_cached_tokens,
            }
        )


def tell_attempt(span: Span, request: GenerateRequest, pair: Pair) -> None:
    if span.is_recording:
        host, _, port = pair.decode.address.rpartition(":")
        span.set(
            {
                **_pair(pair),
                "packlight.attempt.id": request.request_id,
                "packlight.recipe": request.pack.recipe,
                "server.address": host or pair.decode.address,
                "server.port": int(port) if host and port.isdecimal() else None,
            }
        )


def end_attempt(span: Span, event: GenerateEvent) -> None:
    """`event` is its last. One that ends without was given up: the client left, or a stop string came."""
    if isinstance(event, Finished):
        span.set({"gen_ai.response.finish_reasons": [event.reason.value]})
        span.end()
    elif isinstance(event, Failed):
        span.end(span_error(event.error))


def _pair(pair: Pair) -> Attributes:
    return {
        "packlight.placement": pair.where,
        "packlight.prefill.id": pair.prefill.worker_id,
        "packlight.decode.id": pair.decode.worker_id,
    }
