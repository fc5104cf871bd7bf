"""How fast KV comes from each prefill worker: measured on every shipment, told to the router in each heartbeat.

Knows pairs and rates. Shipments themselves are the measurement, and no probe is sent: the first one of a pair is as
good as a probe, costs nothing, and goes the very way that the next one will go, checksums and copies included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from packlight.core.rate import LEAST_SHIPPED_BYTES, Rate
from packlight.core.workers import WorkerId

MOST_PAIRS = 256

FRESH_S = 600.0
"""What a link was like longer ago is not told: who looked slow gets another chance."""


@dataclass(slots=True)
class _Pair:
    transport: str
    noted_s: float = 0.0
    rate: Rate = field(default_factory=Rate)


class PairRates:
    """Of one decode worker; at most `MOST_PAIRS`, those heard of last."""

    def __init__(self) -> None:
        self._pairs: dict[WorkerId, _Pair] = {}

    def note(self, prefill_id: WorkerId, transport: str, num_bytes: int, ship_s: float, now_s: float) -> float | None:
        """One shipment. The pair's bytes per second now; None if the shipment says nothing of it. What came by another
        transport before is forgotten."""
        if num_bytes < LEAST_SHIPPED_BYTES or ship_s <= 0:
            return None
        pair = self._pairs.pop(prefill_id, None)
        if pair is None or pair.transport != transport:
            pair = _Pair(transport)
        self._pairs[prefill_id] = pair  # the last one heard of is the last in the dictionary
        pair.noted_s = now_s
        pair.rate.add(num_bytes, ship_s)
        return pair.rate.per_s

    def forget_oldest(self) -> tuple[WorkerId, str] | None:
        """The pair that is one too many: (prefill worker, transport)."""
        if len(self._pairs) <= MOST_PAIRS:
            return None
        prefill_id = next(iter(self._pairs))
        return prefill_id, self._pairs.pop(prefill_id).transport

    def transport_of(self, prefill_id: WorkerId) -> str | None:
        pair = self._pairs.get(prefill_id)
        return pair.transport if pair else None

    def bytes_per_s(self, now_s: float) -> dict[WorkerId, float]:
        """Of the pairs heard of lately."""
        pairs = self._pairs.items()
        return {prefill_id: pair.rate.per_s for prefill_id, pair in pairs if now_s - pair.noted_s <= FRESH_S}
