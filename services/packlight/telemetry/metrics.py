"""What each role measures: small classes over the catalogue, on a registry that the caller owns.

Knows which observation goes to which metric. Does not know when things happen. There is no global registry: two engines
in one process have two, or share one, as their names differ by role.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from packlight.core.types import KVUsage, Timings
from packlight.telemetry.instruments import Instruments, Shipments


class ProcessMetrics:
    """What every process shows, whatever its role."""

    def __init__(self, role: str, registry: CollectorRegistry) -> None:
        self._expiry = Instruments(role, registry).gauge("certificate_expiry_timestamp_seconds")

    def follow_certificate(self, valid_until: Callable[[], float]) -> None:
        """`valid_until`, in Unix seconds, is asked whenever metrics are, from any thread."""
        self._expiry.set_function(valid_until)


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        made = Instruments("router", registry)
        self._requests = made.counter("requests")
        self._inflight = made.gauge("inflight_requests")
        self._request_s = made.histogram("request_seconds")
        self._errors = made.errors("errors")
        self._retries = made.errors("retries", retryable_only=True)
        self._first_token_s = made.histogram("time_to_first_token_seconds")
        self._part_s = made.histogram("time_to_first_token_part_seconds")
        self._per_token_s = made.histogram("time_per_output_token_seconds")
        self._placements = made.counter("placements")
        self._prediction = made.histogram("first_token_prediction_ratio")
        self._prompt = made.counter("prompt_tokens")
        self._cached = made.counter("cached_prompt_tokens")
        self._generated = made.counter("generated_tokens")
        self._auto = made.counter("auto_recipes")
        self._grown = made.histogram("grown_tokens")
        self._ignored = made.counter("ignored_parameters")
        self._workers = made.gauge("workers")
        self._ready = made.gauge("ready")
        self._index = made.gauge("index_available")
        self._draining = made.gauge("draining")
        self._shipments = Shipments(made)

    def request_started(self, endpoint: str) -> None:
        self._inflight.labels(endpoint).inc()

    def request_ended(self, endpoint: str, outcome: str, seconds: float) -> None:
        """Exactly once for every `request_started`."""
        self._inflight.labels(endpoint).dec()
        self._requests.labels(endpoint, outcome).inc()
        self._request_s.labels(endpoint).observe(seconds)

    def count_error(self, type: str) -> None:
        self._errors.labels(type).inc()

    def count_retry(self, type: str) -> None:
        self._retries.labels(type).inc()

    def count_ignored(self, num: int) -> None:
        self._ignored.inc(num)

    def count_prompt(self, num_tokens: int) -> None:
        self._prompt.inc(num_tokens)

    def count_cached(self, num_tokens: int) -> None:
        self._cached.inc(num_tokens)

    def count_generated(self, num_tokens: int) -> None:
        self._generated.inc(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token_s.observe(seconds)

    def observe_per_token(self, seconds: float) -> None:
        self._per_token_s.observe(seconds)

    def count_placement(self, prefill: str, reason: str) -> None:
        """`local` or `remote`, and why: a `Reason` of `router/placement.py`."""
        self._placements.labels(prefill, reason).inc()

    def observe_prediction(self, prefill: str, predicted_s: float, actual_s: float) -> None:
        """The first token of an attempt is here."""
        self._prediction.labels(prefill).observe(actual_s / max(predicted_s, 1e-6))

    def observe_prepare(self, seconds: float) -> None:
        """Validation, chat template and tokenising."""
        self._part_s.labels("prepare").observe(seconds)

    def observe_route(self, seconds: float) -> None:
        """Prefix lookup and placement."""
        self._part_s.labels("route").observe(seconds)

    def observe_timings(self, timings: Timings) -> None:
        """The parts that the workers report."""
        for part in ("decode_queue", "prefill_queue", "prefill", "select", "transfer", "first_step"):
            self._part_s.labels(part).observe(getattr(timings, f"{part}_s"))

    def count_auto(self, recipe: str) -> None:
        self._auto.labels(recipe).inc()

    def observe_kv(self, kv: KVUsage) -> None:
        self._grown.labels(kv.recipe).observe(kv.num_grown_tokens)
        self._shipments.observe(kv.recipe, kv.num_kept_tokens, kv.shipped_bytes, kv.exact_bytes, kv.retained_mass)

    def set_workers(self, role: str, num: int) -> None:
        self._workers.labels(role).set(num)

    def set_ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def set_index_available(self, available: bool) -> None:
        self._index.set(available)

    def set_draining(self, draining: bool) -> None:
        self._draining.set(draining)


class _WorkerMetrics:
    """What both kinds of workers measure."""

    def __init__(self, made: Instruments, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._requests = made.counter("requests")
        self._errors = made.errors("errors")
        self._pages = made.gauge("pages")
        self._queued = made.gauge("queued_requests")
        self._oldest_queued = made.gauge("oldest_queued_timestamp_seconds")
        self._running = made.gauge("running_requests")
        self._queue_s = made.histogram("queue_seconds")
        self._step_s = made.histogram("step_seconds")
        self._links = made.counter("links")
        self._shipments = Shipments(made)

    def count_request(self, outcome: str) -> None:
        """How a request ended: completed, cancelled, refused or failed."""
        self._requests.labels(outcome).inc()

    def count_error(self, type: str) -> None:
        self._errors.labels(type).inc()

    def set_pages(self, free: int, held: int, cached: int) -> None:
        for state, num in (("free", free), ("held", held), ("cached", cached)):
            self._pages.labels(state).set(num)

    def set_queue(self, num: int, oldest_wait_s: float = 0.0) -> None:
        """`oldest_wait_s` is how long the first in the queue has waited. It is shown as a point in time, which stays
        right while nothing happens: that is when it matters."""
        self._queued.set(num)
        self._oldest_queued.set(self._wall_clock() - oldest_wait_s if num else 0)

    def count_link(self, transport: str, event: str) -> None:
        """From any thread."""
        self._links.labels(transport, event).inc()

    def set_running(self, num: int) -> None:
        self._running.set(num)

    def observe_queue(self, seconds: float) -> None:
        self._queue_s.observe(seconds)

    def observe_shipment(
        self, recipe: str, kept: float, shipped_bytes: int, exact_bytes: int, mass: float | None
    ) -> None:
        self._shipments.observe(recipe, kept, shipped_bytes, exact_bytes, mass)


class PrefillMetrics(_WorkerMetrics):
    def __init__(self, registry: CollectorRegistry, *, wall_clock: Callable[[], float] = time.time) -> None:
        made = Instruments("prefill", registry)
        super().__init__(made, wall_clock)
        self._prompt = made.counter("prompt_tokens")
        self._cached = made.counter("cached_prompt_tokens")
        self._prefill_s = made.histogram("prefill_seconds")
        self._select_s = made.histogram("select_seconds")
        self._ship_s = made.histogram("ship_seconds")
        self._ship_exposed_s = made.histogram("ship_exposed_seconds")
        self._step_tokens = made.histogram("step_tokens")
        self._step_prompts = made.histogram("step_prompts")
        self._layers = made.counter("shipped_layers")
        self._shadow_kl = made.histogram("shadow_kl_nats")
        self._shadow_tokens = made.counter("shadow_tokens")

    def observe_prefill(
        self, num_prompt_tokens: int, num_cached_tokens: int, prefill_s: float, select_s: float
    ) -> None:
        """One prompt is done."""
        self._prompt.inc(num_prompt_tokens)
        self._cached.inc(num_cached_tokens)
        self._prefill_s.observe(prefill_s)
        self._select_s.observe(select_s)

    def observe_shipping(self, transport: str, ship_s: float, exposed_s: float) -> None:
        """One shipment is over: how long its layers took, and for how long of it nothing was computed of the prompt."""
        self._ship_s.labels(transport).observe(ship_s)
        self._ship_exposed_s.labels(transport).observe(exposed_s)

    def count_layers(self, transport: str, num_inline: int, num_beside: int) -> None:
        """One shipment's, by where their bytes went."""
        self._layers.labels(transport, "inline").inc(num_inline)
        self._layers.labels(transport, "beside").inc(num_beside)

    def observe_shadow(self, recipe: str, kl_nats: float, is_same_token: bool) -> None:
        """How far the next token's distribution under packed KV is from the exact one."""
        self._shadow_kl.labels(recipe).observe(kl_nats)
        for same, is_it in (("yes", is_same_token), ("no", not is_same_token)):  # both: a share is of what there is
            self._shadow_tokens.labels(recipe, same).inc(int(is_it))

    def observe_step(self, num_prompts: int, num_tokens: int, seconds: float) -> None:
        self._step_prompts.observe(num_prompts)
        self._step_tokens.observe(num_tokens)
        self._step_s.observe(seconds)


class DecodeMetrics(_WorkerMetrics):
    def __init__(self, registry: CollectorRegistry, *, wall_clock: Callable[[], float] = time.time) -> None:
        made = Instruments("decode", registry)
        super().__init__(made, wall_clock)
        self._generated = made.counter("generated_tokens")
        self._batch = made.histogram("batch_size")
        self._transfer_s = made.histogram("transfer_seconds")
        self._first_step_s = made.histogram("first_step_seconds")
        self._stall_s = made.histogram("stall_seconds")
        self._graph_steps = made.counter("graph_steps")
        self._link_pace = made.gauge("link_bytes_per_second")

    def observe_step(self, batch: int, seconds: float) -> None:
        """One token for each of `batch` requests."""
        self._generated.inc(batch)
        self._batch.observe(batch)
        self._step_s.observe(seconds)

    def set_link_pace(self, prefill_id: str, transport: str, bytes_per_s: float) -> None:
        self._link_pace.labels(prefill_id, transport).set(bytes_per_s)

    def forget_link(self, prefill_id: str, transport: str) -> None:
        self._link_pace.remove(prefill_id, transport)

    def observe_transfer(self, seconds: float) -> None:
        self._transfer_s.observe(seconds)

    def observe_first_step(self, seconds: float) -> None:
        self._first_step_s.observe(seconds)

    def observe_stall(self, seconds: float) -> None:
        """A step waited for this long, because the thread was prefilling."""
        self._stall_s.observe(seconds)

    def count_graph_step(self, mode: str) -> None:
        """`mode` is a `Mode` of `engine/graph_choice.py`."""
        self._graph_steps.labels(mode).inc()
