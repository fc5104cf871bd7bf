"""Every metric of every process, as data: what it is called, what it counts, how it is cut into buckets.

Knows names. Does not know who measures; `telemetry/metrics.py` gives each role the methods to do so. A full name is
`packlight_<role>_<name>`, and a counter gains `_total`, as Prometheus wants. Labels have few values, all of them from
configuration or code: no request id, no prompt, no model name of a client's making.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, help, labels)


def _histogram(name: str, buckets: tuple[float, ...], help: str, *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, labels, buckets)


# Seconds. A step of a small model takes 1 ms, so that is where the finest scale starts.
STEP_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)
PHASE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
WHOLE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = tuple(float(2**power) for power in range(4, 19))
GROWN = (0.0, *TOKENS)
BATCH = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
RATIO = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)
SHARE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
PREDICTION = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
NATS = (1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

PROCESS = (
    _gauge(
        "certificate_expiry_timestamp_seconds",
        "Unix time at which the certificate ends that this process shows the fleet. Only with `tls`.",
    ),
)
SHIPMENT = (
    _histogram("kept_tokens", TOKENS, "Prompt tokens kept per KV head, mean over layers and heads.", "recipe"),
    _counter("shipped_bytes", "Bytes of KV that were shipped.", "recipe"),
    _counter("exact_bytes", "Bytes that the exact KV of the same prompts takes.", "recipe"),
    _histogram("compression_ratio", RATIO, "Exact bytes over shipped bytes of one prompt.", "recipe"),
    _histogram("attention_mass_retained", SHARE, "Share of the attention mass on the kept tokens.", "recipe"),
)
WORKER = (
    _counter("requests", "Requests that ended, by how.", "outcome"),
    _counter("errors", "Errors by class.", "type"),
    _gauge("pages", "KV pages by state: free, held, cached.", "state"),
    _gauge("queued_requests", "Requests waiting for admission."),
    _gauge("oldest_queued_timestamp_seconds", "Unix time at which the request that waits longest came; 0: none waits."),
    _gauge("running_requests", "Requests admitted and unfinished."),
    _histogram("queue_seconds", PHASE_S, "Time from arrival to admission."),
    _counter(
        "links",
        "Links to other workers, by what happened to them: `made`, `not made` or `dropped`.",
        *("transport", "event"),
    ),
    _histogram("step_seconds", STEP_S, "Duration of one step."),
)
ROUTER = (
    _counter("requests", "HTTP requests for answers that ended, by how.", "endpoint", "outcome"),
    _gauge("inflight_requests", "HTTP requests for answers in progress.", "endpoint"),
    _histogram("request_seconds", WHOLE_S, "Time from arrival to the last byte.", "endpoint"),
    _counter("errors", "Errors by class.", "type"),
    _counter("retries", "Attempts after the first, by the error that caused them.", "type"),
    _histogram("time_to_first_token_seconds", FIRST_TOKEN_S, "Time from arrival to the first token of a choice."),
    _histogram(
        "time_to_first_token_part_seconds",
        PHASE_S,
        "Its parts: prepare, route, decode_queue, prefill_queue, prefill, select, transfer, first_step.",
        "part",
    ),
    _counter(
        "placements",
        "Attempts placed, by who prefills: `remote`, or `local` to the decode worker; and by why.",
        *("prefill", "reason"),
    ),
    _histogram(
        "first_token_prediction_ratio",
        PREDICTION,
        "Time from placement to the first token, over the time that was predicted.",
        "prefill",
    ),
    _histogram("time_per_output_token_seconds", STEP_S, "Mean time between the tokens of a choice, after the first."),
    _counter("prompt_tokens", "Prompt tokens, once per prompt."),
    _counter("cached_prompt_tokens", "Prompt tokens found in a prefix cache."),
    _counter("generated_tokens", "Tokens generated, also those of answers that failed or were abandoned."),
    _counter("auto_recipes", "Choices whose recipe the policy chose, by recipe.", "recipe"),
    _histogram("grown_tokens", GROWN, "Tokens kept per KV head beyond the budget, to hold the mass floor.", "recipe"),
    _counter("ignored_parameters", "Unknown request parameters that were ignored."),
    _gauge("workers", "Live workers that take new requests.", "role"),
    _gauge("ready", "1 when a new request would be served: workers that can are alive, and no drain."),
    _gauge("index_available", "1 when the prefix index answers, 0 when requests are placed without it."),
    _gauge("draining", "1 when no new requests are taken."),
)
PREFILL = (
    _counter("prompt_tokens", "Prompt tokens of prefilled requests."),
    _counter("cached_prompt_tokens", "Prompt tokens found in this worker's prefix cache."),
    _histogram("prefill_seconds", PHASE_S, "Time from admission to the end of the last chunk."),
    _histogram("select_seconds", PHASE_S, "Time spent on scoring, selecting and packing one prompt."),
    _histogram("ship_seconds", PHASE_S, "Time spent on passing one prompt's KV on, by transport.", "transport"),
    _histogram(
        "ship_exposed_seconds",
        PHASE_S,
        "Of that, after the prompt was computed: what computing did not hide.",
        "transport",
    ),
    _counter(
        "shipped_layers",
        "Layers shipped, by whether their bytes went `inline` in the stream or `beside` it.",
        *("transport", "way"),
    ),
    _histogram("shadow_kl_nats", NATS, "Divergence of the next token's distribution, exact from packed KV.", "recipe"),
    _counter("shadow_tokens", "Sampled requests, by whether packed KV has the same likeliest token.", "recipe", "same"),
    _histogram("step_tokens", TOKENS, "Tokens prefilled in one step."),
    _histogram("step_prompts", BATCH, "Prompts in one step."),
)
DECODE = (
    _counter("generated_tokens", "Tokens generated here."),
    _histogram("batch_size", BATCH, "Requests in one step."),
    _histogram(
        "transfer_seconds",
        PHASE_S,
        "Time from the first token's arrival to the last page's: what shipping did not hide.",
    ),
    _histogram(
        "first_step_seconds", PHASE_S, "Time from the last page's arrival to the second token, the first made here."
    ),
    _histogram("stall_seconds", PHASE_S, "Time a decode step waited for a prefill step on the same cores."),
    _counter("graph_steps", "Decode steps on GPUs, by whether a captured graph was replayed or why not.", "mode"),
    _gauge(
        "link_bytes_per_second",
        "Pace at which KV came from a prefill worker, by the transport of its last shipment.",
        *("prefill_worker", "transport"),
    ),
)

CATALOGUE: Mapping[str, tuple[Metric, ...]] = MappingProxyType(
    {
        "router": PROCESS + ROUTER + SHIPMENT,
        "prefill": PROCESS + WORKER + PREFILL + SHIPMENT,
        "decode": PROCESS + WORKER + DECODE + SHIPMENT,
    }
)


def full_name(role: str, metric: Metric) -> str:
    """The name in the exposition format, without the suffix that Prometheus gives counters."""
    return f"packlight_{role}_{metric.name}"


def catalogue_markdown() -> str:
    """`docs/metrics.md`: one table per role."""
    lines = ["# Metrics", ""]
    for role, metrics in CATALOGUE.items():
        lines += [f"## {role}", "", "| name | kind | labels | what |", "|---|---|---|---|"]
        for metric in metrics:
            suffix = "_total" if metric.kind is Kind.COUNTER else ""
            labels = ", ".join(metric.labels) or "-"
            lines.append(f"| `{full_name(role, metric)}{suffix}` | {metric.kind} | {labels} | {metric.help} |")
        lines.append("")
    return "\n".join(lines)
