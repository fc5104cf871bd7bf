"""What a trace says of one request on a prefill worker, told when its reader leaves, from what it noted on its way.

prefill                        the request, until its reader has everything or left
├─ queue                       waiting for blocks
├─ compute                     from the first chunk to the end of the last; a moment for each chunk
├─ select                      in the last chunk: from scoring the first layer to choosing in the last
├─ pack                        gathering and encoding what was chosen; a moment for each layer
└─ ship                        from the first frame to the last that the reader took

Selecting, packing and shipping take turns layer by layer, and with computing: `packlight.busy_s` is what each had.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from packlight.compress.recipes import codec_of
from packlight.prefill.marks import LayerMark, Marks, PackMark
from packlight.prefill.task import Task
from packlight.telemetry.traces import Attributes, Moment


def tell_span(task: Task, marks: Marks, now_s: float) -> None:
    """All but the end of `task.span`."""
    task.span.set(_attributes(task))
    task.span.child("queue", task.arrived_s, task.started_s or now_s)
    if task.started_s:
        _tell_computing(task, marks, now_s)
    shift_s = now_s - time.perf_counter()  # marks and frames are timed by the compute thread's clock
    # Of a request that was left, the compute thread may be noting more.
    selected, packed = tuple(marks.selected), tuple(marks.packed)
    _tell_layers(task, "select", selected, shift_s)
    _tell_layers(task, "pack", packed, shift_s, _of_layers(selected, packed, marks.retained_mass, shift_s))
    _tell_shipping(task, shift_s)


def _tell_computing(task: Task, marks: Marks, now_s: float) -> None:
    chunks = [
        Moment("chunk", at_s, {"packlight.chunk.start": start, "packlight.chunk.tokens": end - start})
        for start, end, at_s in marks.chunks
    ]
    is_whole = task.num_done == task.num_tokens
    ended_s = chunks[-1].at_s if chunks and is_whole else now_s
    task.span.child("compute", task.started_s, ended_s, {"packlight.chunks": len(chunks)}, chunks)


def _tell_layers(
    task: Task, name: str, layers: Sequence[LayerMark], shift_s: float, moments: Sequence[Moment] = ()
) -> None:
    if layers:
        busy_s = sum(mark.took_s for mark in layers)
        start_s, end_s = shift_s + layers[0].started_s, shift_s + layers[-1].ended_s
        task.span.child(name, start_s, end_s, {"packlight.busy_s": busy_s}, moments)


def _of_layers(
    selected: Sequence[LayerMark], packed: Sequence[PackMark], masses: Mapping[int, float], shift_s: float
) -> list[Moment]:
    """One for both: of dozens of layers, each moment is felt."""
    select_s = {mark.layer: mark.took_s for mark in selected}
    return [
        Moment(
            "layer",
            shift_s + mark.ended_s,
            {
                "packlight.layer": mark.layer,
                "packlight.select_s": select_s.get(mark.layer),
                "packlight.pack_s": mark.took_s,
                "packlight.kept_tokens": mark.num_kept_tokens,
                "packlight.shipped_bytes": mark.num_bytes,
                "packlight.attention_mass": masses.get(mark.layer),
            },
        )
        for mark in packed
    ]


def _tell_shipping(task: Task, shift_s: float) -> None:
    spent = task.outbox.time
    if spent.started_s is None:
        return
    facts: Attributes = {
        "packlight.transport": task.transport,
        "packlight.busy_s": spent.busy_s,
        "packlight.exposed_s": spent.exposed_s,
    }
    task.span.child("ship", shift_s + spent.started_s, shift_s + spent.ended_s, facts)


def _attributes(task: Task) -> Attributes:
    shipped = task.shipped
    return {
        "packlight.attempt.id": task.request.request_id,
        "packlight.outcome": _outcome(task),
        "packlight.recipe": task.request.pack.recipe,
        "packlight.codec": codec_of(task.request.pack),
        "packlight.transport": task.transport,
        "gen_ai.usage.input_tokens": task.num_tokens,
        "gen_ai.usage.cache_read.input_tokens": task.num_cached,
        "packlight.kept_tokens": shipped.num_kept_tokens if shipped else None,
        "packlight.grown_tokens": shipped.num_grown_tokens if shipped else None,
        "packlight.shipped_bytes": shipped.shipped_bytes if shipped else None,
        "packlight.exact_bytes": shipped.exact_bytes if shipped else None,
        "packlight.attention_mass": shipped.retained_mass if shipped else None,
    }


def _outcome(task: Task) -> str:
    if task.outbox.is_complete:
        return "completed"
    return "cancelled" if task.outbox.error is None else "failed"
