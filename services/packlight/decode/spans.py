"""What a trace says of one request on a decode worker, told when the request is over, from what its task noted.

generate                       the request, from its arrival until its pages are free
├─ admit                       waiting for a row of the batch and for pages
├─ prefill                     the prefill worker's own, see `prefill/spans.py`
├─ receive                     from the manifest to the last page; the first token comes in between
└─ decode                      steps, from the last page to the end
"""

from __future__ import annotations

from packlight.core.errors import PacklightError
from packlight.core.types import FinishReason
from packlight.decode.task import Task
from packlight.telemetry.traces import Attributes, Moment, span_error


def end_span(task: Task, now_s: float) -> None:
    """`task` was closed just now."""
    if not task.span.is_recording:
        return
    _tell_parts(task, now_s)
    task.span.set(_attributes(task))
    task.span.end(span_error(task.outcome) if isinstance(task.outcome, PacklightError) else None)


def _tell_parts(task: Task, now_s: float) -> None:
    """Each part ends where the next one begins, and the last one now."""
    span, first = task.span, Moment("first token", task.first_token_s)
    admitted_s = task.arrived_s + task.timings.decode_queue_s if task.fetch else now_s
    span.child("admit", task.arrived_s, admitted_s)
    if task.accepted_s:
        seen = [first] if task.generated else []
        span.child("receive", task.accepted_s, task.ready_s or now_s, _received(task), seen)
    if task.ready_s:
        steps = len(task.generated) - 1
        moments = [Moment("first step", task.ready_s + task.timings.first_step_s)] if steps else []
        span.child("decode", task.ready_s, now_s, {"packlight.decode.steps": steps}, moments)


def _received(task: Task) -> Attributes:
    return {
        "packlight.shipped_bytes": task.received_bytes,
        "packlight.num_layers": task.shipped.num_layers if task.shipped else None,
    }


def _attributes(task: Task) -> Attributes:
    usage = task.usage()
    return {
        "packlight.attempt.id": task.request.request_id,
        "packlight.outcome": _outcome(task),
        "packlight.recipe": usage.kv.recipe,
        "packlight.codec": usage.kv.codec,
        "packlight.resumed_tokens": task.num_resumed or None,
        "gen_ai.usage.input_tokens": usage.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.num_cached_tokens,
        "gen_ai.usage.output_tokens": len(task.generated),
        "gen_ai.response.finish_reasons": [task.outcome.value] if isinstance(task.outcome, FinishReason) else None,
    }


def _outcome(task: Task) -> str:
    if task.outcome is None:
        return "cancelled"
    return "completed" if isinstance(task.outcome, FinishReason) else "failed"
