"""What a decode worker measures of itself and of its links, which placement goes by, and its metrics.

Knows figures and where they are told. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packlight.core.errors import PacklightError
from packlight.core.rate import Rate
from packlight.core.shipping import Shipped
from packlight.core.workers import WorkerId
from packlight.decode.pair_rates import PairRates
from packlight.decode.task import Task
from packlight.kv.pages import PageBook
from packlight.kv.shards import ShardedPageBook
from packlight.telemetry.metrics import DecodeMetrics


class Meter:
    def __init__(self, metrics: DecodeMetrics, clock: Callable[[], float]) -> None:
        self._metrics, self._clock, self._steps, self._pairs = metrics, clock, Rate(), PairRates()

    @property
    def step_s(self) -> float:
        """Of the last steps; 0 before the first."""
        return 1 / self._steps.per_s if self._steps.per_s else 0.0

    @property
    def link_bytes_per_s(self) -> Mapping[WorkerId, float]:
        """By prefill worker."""
        return self._pairs.bytes_per_s(self._clock())

    def step(self, num_rows: int, waited_s: float, took_s: float) -> None:
        self._metrics.observe_stall(waited_s)
        self._steps.add(1, took_s)
        self._metrics.observe_step(num_rows, took_s)

    def state(self, num_queued: int, oldest_wait_s: float, num_running: int, book: PageBook | ShardedPageBook) -> None:
        self._metrics.set_queue(num_queued, oldest_wait_s)
        self._metrics.set_running(num_running)
        self._metrics.set_pages(book.num_free, book.num_held, 0)

    def ended(self, how: str, error: PacklightError | None = None) -> None:
        """A request was `completed`, `cancelled`, `refused`, or `failed` by `error`."""
        self._metrics.count_request(how)
        if error is not None:
            self._metrics.count_error(type(error).__name__)

    def admitted(self, task: Task) -> None:
        self._metrics.observe_queue(task.timings.decode_queue_s)

    def first_step(self, task: Task) -> None:
        self._metrics.observe_first_step(task.timings.first_step_s)

    def arrived(self, task: Task, shipped: Shipped) -> None:
        """All pages are here."""
        self._metrics.observe_transfer(task.timings.transfer_s)
        self._note_pace(task, shipped)
        kv = task.usage().kv
        self._metrics.observe_shipment(
            kv.recipe, kv.num_kept_tokens, kv.shipped_bytes, kv.exact_bytes, kv.retained_mass
        )

    def _note_pace(self, task: Task, shipped: Shipped) -> None:
        prefill_id, before = task.request.prefill_id, self._pairs.transport_of(task.request.prefill_id)
        pace = self._pairs.note(prefill_id, task.transport, shipped.shipped_bytes, shipped.ship_s, self._clock())
        if pace is None:
            return
        if before is not None and before != task.transport:
            self._metrics.forget_link(prefill_id, before)
        self._metrics.set_link_pace(prefill_id, task.transport, pace)
        if (oldest := self._pairs.forget_oldest()) is not None:
            self._metrics.forget_link(*oldest)
