"""The dashboard to look at first: is the fleet well, how fast does it answer, what is full."""

from __future__ import annotations

from deploy.observability import promql
from deploy.observability.grafana import Dashboard, Kind, Panel, Query, Row, Unit

WORKERS = ("prefill", "decode")
GOOD, WARN, BAD = "green", "orange", "red"
NEEDED = ((None, BAD), (1.0, GOOD))  # at least one
_QUANTILES = (0.5, 0.95, 0.99)


def _quantiles(role: str, name: str) -> tuple[Query, ...]:
    return tuple(Query(promql.quantile(q, role, name), f"p{100 * q:g}") for q in _QUANTILES)


def _of_workers(name: str) -> tuple[Query, ...]:
    return tuple(Query(promql.gauge(role, name), role) for role in WORKERS)


_COMPLETED = promql.rate("router", "requests", outcome="completed")
_ALL = promql.rate("router", "requests")

HEALTH = Row(
    "Is it well?",
    (
        Panel(
            "Ready routers",
            "Routers that would serve a new request now: workers that can serve it together, or a decode worker that "
            "can alone, are alive, and the router does not drain.",
            (Query(promql.gauge("router", "ready")),),
            Unit.COUNT,
            Kind.NUMBER,
            4,
            limits=NEEDED,
        ),
        *(
            Panel(
                f"{role.capitalize()} workers",
                f"Live {role} workers that take new requests, as the router that sees the fewest sees them.",
                (Query(promql.gauge("router", "workers", how="min", role=role)),),
                Unit.COUNT,
                Kind.NUMBER,
                4,
                limits=NEEDED,
            )
            for role in WORKERS
        ),
        Panel(
            "Prefix index",
            "1 while every router reaches the prefix index. At 0 requests are placed by load alone and prefixes are "
            "computed again.",
            (Query(promql.gauge("router", "index_available", how="min")),),
            Unit.COUNT,
            Kind.NUMBER,
            4,
            limits=NEEDED,
        ),
        Panel(
            "Requests in progress",
            "HTTP requests for answers that have come and not ended.",
            (Query(promql.gauge("router", "inflight_requests")),),
            Unit.COUNT,
            Kind.NUMBER,
            4,
        ),
        Panel(
            "Requests completed",
            "Share of the requests that ended with a whole answer. The rest was refused, failed, timed out, was wrong, "
            "or left.",
            (Query(f"{_COMPLETED} / {_ALL}"),),
            Unit.SHARE,
            Kind.NUMBER,
            4,
            limits=((None, BAD), (0.95, WARN), (0.99, GOOD)),
        ),
    ),
)

SPEED = Row(
    "How fast are answers?",
    (
        Panel(
            "Time to first token",
            "From a request's arrival at the router to the first token of each choice.",
            _quantiles("router", "time_to_first_token_seconds"),
            Unit.SECONDS,
        ),
        Panel(
            "Time per output token",
            "Mean time between the tokens of a choice, after the first.",
            _quantiles("router", "time_per_output_token_seconds"),
            Unit.SECONDS,
        ),
        Panel(
            "Tokens",
            "Prompt tokens computed (those in a prefix cache are not), and tokens generated.",
            (
                Query(
                    f"{promql.rate('prefill', 'prompt_tokens')} - {promql.rate('prefill', 'cached_prompt_tokens')}",
                    "prefilled",
                ),
                Query(promql.rate("prefill", "cached_prompt_tokens"), "found in a prefix cache"),
                Query(promql.rate("router", "generated_tokens"), "generated"),
            ),
            Unit.A_SECOND,
        ),
        Panel(
            "Requests by outcome",
            "How requests ended: completed, invalid, refused, cancelled, timeout, failed.",
            (Query(promql.rate("router", "requests", "outcome"), "{{outcome}}"),),
            Unit.A_SECOND,
            is_stacked=True,
        ),
        Panel(
            "Errors",
            "What requests ended with at the routers, by class of error.",
            (Query(promql.rate("router", "errors", "type"), "{{type}}"),),
            Unit.A_SECOND,
        ),
        Panel(
            "Attempts again",
            "Attempts after the first, by the error that caused them. Clients saw none of these errors.",
            (Query(promql.rate("router", "retries", "type"), "{{type}}"),),
            Unit.A_SECOND,
        ),
    ),
)

ROOM = Row(
    "What is full?",
    (
        Panel(
            "Requests waiting",
            "Requests in the workers' queues. Decode's wait for pages or a place in the batch, prefill's for blocks.",
            _of_workers("queued_requests"),
            Unit.COUNT,
        ),
        Panel(
            "Longest wait",
            "How long the request at the head of a queue has waited.",
            tuple(
                Query(
                    f"max((time() - {promql.gauge(role, 'oldest_queued_timestamp_seconds', 'instance', how='min')}) * "
                    f"({promql.gauge(role, 'queued_requests', 'instance')} > bool 0))",
                    role,
                )
                for role in WORKERS
            ),
            Unit.SECONDS,
        ),
        Panel(
            "Requests running",
            "Requests that workers have admitted and not finished.",
            _of_workers("running_requests"),
            Unit.COUNT,
        ),
        *(
            Panel(
                f"Pages of {role}",
                f"KV pages of the {role} pools by state. {meaning}",
                (
                    Query(
                        f"{promql.gauge(role, 'pages', 'state')} / on() group_left() {promql.gauge(role, 'pages')}",
                        "{{state}}",
                    ),
                ),
                Unit.SHARE,
                is_stacked=True,
            )
            for role, meaning in (
                ("prefill", "Cached ones hold exact prefixes, and are given up when a prompt needs them."),
                ("decode", "Held ones are packed KV of running requests."),
            )
        ),
        Panel(
            "Batch",
            "Requests in one decode step, and prompts in one prefill step, on average.",
            (
                Query(promql.mean("decode", "batch_size"), "decode"),
                Query(promql.mean("prefill", "step_prompts"), "prefill"),
            ),
            Unit.COUNT,
        ),
        Panel(
            "Step",
            "Duration of one step: a token for each running request, or a chunk of prompts.",
            tuple(
                Query(promql.quantile(q, role, "step_seconds"), f"{role} p{100 * q:g}")
                for role in WORKERS
                for q in (0.5, 0.95)
            ),
            Unit.SECONDS,
        ),
        Panel(
            "Requests refused by workers",
            "Requests that found a queue full, or a worker draining, and were tried elsewhere or got a 429.",
            tuple(Query(promql.rate(role, "errors", "type"), f"{role}: {{{{type}}}}") for role in WORKERS),
            Unit.A_SECOND,
        ),
        Panel(
            "Who prefills",
            "Prompts sent to a prefill worker, and prompts that decode workers compute themselves: those that are not "
            "worth a transfer, or all that fit while there is no prefill worker.",
            (Query(promql.rate("router", "placements", "prefill", "reason"), "{{prefill}}: {{reason}}"),),
            Unit.A_SECOND,
        ),
        Panel(
            "Waiting for a prefill",
            "Decode steps that waited for a prefill step on the same cores: seconds waited a second.",
            (Query(promql.total("decode", "stall_seconds"), "waited"),),
            Unit.SHARE,
        ),
        Panel(
            "Predicted time to first token",
            "Time from placement to the first token over what placement predicted; 1 is right. The median, by who "
            "prefilled.",
            (Query(promql.quantile(0.5, "router", "first_token_prediction_ratio", "prefill"), "{{prefill}}"),),
            Unit.COUNT,
        ),
    ),
)

FLEET = Dashboard(
    "packlight-fleet",
    "Packlight: fleet",
    "Is the fleet well, how fast does it answer, what is full.",
    (HEALTH, SPEED, ROOM),
)
