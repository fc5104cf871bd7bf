"""Workers on the board that the router cannot call, because one of the two speaks TLS and the other does not.

Knows which of them were told of. Does not decide who is used (`readiness.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from packlight.core.workers import WorkerId, WorkerInfo
from packlight.router.readiness import why_unreachable

log = logging.getLogger(__name__)


class Strangers:
    """Tells of each life of such a worker once."""

    def __init__(self, *, speaks_tls: bool) -> None:
        self._speaks_tls = speaks_tls
        self._told: set[tuple[WorkerId, int]] = set()

    def tell(self, workers: Sequence[WorkerInfo]) -> list[str]:
        """What is wrong with those of `workers` that are strangers."""
        lives = {(w.worker_id, w.generation): why_unreachable(w, speaks_tls=self._speaks_tls) for w in workers}
        reasons = {life: why for life, why in lives.items() if why}
        for life in reasons.keys() - self._told:
            log.warning("%s. It gets no requests until then", reasons[life])
        self._told = set(reasons)
        return list(reasons.values())
