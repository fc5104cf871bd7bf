"""The dashboard of one request's life: where the time to its first token goes, and what comes after."""

from __future__ import annotations

from deploy.observability import promql
from deploy.observability.grafana import Dashboard, Kind, Panel, Query, Row, Unit

PARTS = {
    "prepare": "Router: validation, chat template, tokenising.",
    "route": "Router: prefix lookup and placement.",
    "decode_queue": "Decode: waiting for head pages and a place in the batch.",
    "prefill_queue": "Prefill: waiting for blocks.",
    "prefill": "Prefill: computing what no cache holds, chunk by chunk, with other prompts between.",
    "select": "Prefill: scoring, selecting and packing, after each layer of the last chunk.",
    "transfer": "Decode: from the first token to the last page. What shipping did not hide behind computing.",
    "first_step": "Decode: from the last page to the second token.",
}
_PART = "time_to_first_token_part_seconds"

WHOLE = Row(
    "From arrival to the first token",
    (
        Panel(
            "Time to first token",
            "All answers. Two bands are two kinds of requests: prompts that are cached and that are not, for example.",
            (Query(promql.buckets("router", "time_to_first_token_seconds")),),
            Unit.SECONDS,
            Kind.HEAT,
            12,
        ),
        Panel(
            "Its parts, on average",
            "What the time to the first token is made of. `transfer` and `first_step` come after the first token.",
            (Query(promql.mean("router", _PART, "part"), "{{part}}"),),
            Unit.SECONDS,
            width=12,
            is_stacked=True,
        ),
    ),
)

EACH = Row(
    "Part by part",
    tuple(
        Panel(
            part,
            meaning,
            tuple(Query(promql.quantile(q, "router", _PART, part=part), f"p{100 * q:g}") for q in (0.5, 0.95)),
            Unit.SECONDS,
            width=6,
        )
        for part, meaning in PARTS.items()
    ),
)

AFTER = Row(
    "From the first token to the end",
    (
        Panel(
            "Time per output token",
            "Mean time between the tokens of a choice, after the first.",
            (Query(promql.buckets("router", "time_per_output_token_seconds")),),
            Unit.SECONDS,
            Kind.HEAT,
        ),
        Panel(
            "Decode step",
            "One token for each request of the batch. A step that takes longer than before has a larger batch, longer "
            "KV, or a neighbour on its cores.",
            tuple(Query(promql.quantile(q, "decode", "step_seconds"), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)),
            Unit.SECONDS,
        ),
        Panel(
            "Whole request",
            "From arrival to the last byte.",
            tuple(
                Query(promql.quantile(q, "router", "request_seconds", "endpoint"), f"{{{{endpoint}}}} p{100 * q:g}")
                for q in (0.5, 0.95)
            ),
            Unit.SECONDS,
        ),
    ),
)

REQUEST_LIFE = Dashboard(
    "packlight-request",
    "Packlight: one request's life",
    "Where the time of an answer goes.",
    (WHOLE, EACH, AFTER),
)
