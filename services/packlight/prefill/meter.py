"""What a prefill worker measures of itself: its pace, which plans and placement go by, and its metrics.

Knows figures and where they are told. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from packlight.core.errors import PacklightError
from packlight.core.rate import LEAST_SHIPPED_BYTES, Pace, Rate, StepTimer
from packlight.core.shipping import Shipped
from packlight.kv.pages import PageBook
from packlight.prefill.task import Stage, Task
from packlight.telemetry.metrics import PrefillMetrics

PACE_HALF_LIFE_S = 1.0
"""How soon the size of the next step follows the speed of the last ones: attention slows a long prompt down."""


class Meter:
    def __init__(self, metrics: PrefillMetrics, clock: Callable[[], float]) -> None:
        self._metrics, self._clock, self._measured_at = metrics, clock, clock()
        self._timer, self._recent, self._shipped = StepTimer(), Rate(PACE_HALF_LIFE_S), Rate()
        self._is_warm = False

    @property
    def pace(self) -> Pace | None:
        """Of steps; None before the second one."""
        return self._timer.pace

    @property
    def recent_tokens_per_s(self) -> float:
        return self._recent.per_s

    @property
    def ship_bytes_per_s(self) -> float:
        return self._shipped.per_s

    @property
    def idle_s(self) -> float:
        """Since the last step."""
        return self._clock() - self._measured_at

    def step(self, num_prompts: int, num_tokens: int, elapsed_s: float) -> None:
        self._metrics.observe_step(num_prompts, num_tokens, elapsed_s)
        self._recent.add(num_tokens, elapsed_s)
        if self._is_warm:  # what the first step of a process takes says nothing of the next
            self._timer.add(num_tokens, elapsed_s)
        self._is_warm, self._measured_at = True, self._clock()

    def state(self, num_queued: int, oldest_wait_s: float, num_running: int, book: PageBook) -> None:
        self._metrics.set_queue(num_queued, oldest_wait_s)
        self._metrics.set_running(num_running)
        self._metrics.set_pages(book.num_free, book.num_held, book.num_cached)

    def refused(self) -> None:
        self._metrics.count_request("refused")

    def failed(self, error: PacklightError) -> None:
        self._metrics.count_request("failed")
        self._metrics.count_error(type(error).__name__)

    def finished(self, task: Task, shipped: Shipped) -> None:
        """Everything is computed; some of it may still have to be read."""
        self._metrics.count_request("completed")
        self._metrics.observe_queue(shipped.queue_s)
        self._metrics.observe_prefill(task.num_tokens, task.num_cached, shipped.prefill_s, shipped.select_s)
        self._metrics.observe_shipment(
            task.request.pack.recipe,
            shipped.num_kept_tokens,
            shipped.shipped_bytes,
            shipped.exact_bytes,
            shipped.retained_mass,
        )

    def left(self, task: Task) -> None:
        """The reader is gone: with everything, or before it was computed."""
        if task.stage in (Stage.QUEUED, Stage.PREFILLING):
            self._metrics.count_request("cancelled")
        if task.outbox.sent.amount >= LEAST_SHIPPED_BYTES:
            self._shipped.add(task.outbox.sent.amount, task.outbox.sent.elapsed_s)
        if task.outbox.is_complete:
            time = task.outbox.time
            self._metrics.observe_shipping(task.transport, time.busy_s, time.exposed_s)
            self._metrics.count_layers(task.transport, time.num_inline, time.num_beside)
