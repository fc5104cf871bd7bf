"""What this router has sent and not seen answered, by worker. Heartbeats are a second old; this is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from packlight.core.workers import WorkerId


@dataclass(slots=True)
class Sent:
    """tokens: of prompts, to who prefills them. requests: to who decodes them."""

    tokens: Counter[WorkerId] = field(default_factory=Counter)
    requests: Counter[WorkerId] = field(default_factory=Counter)

    @contextmanager
    def prefilling(self, worker_id: WorkerId, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts `num_tokens` until the block ends or the yielded function is called."""
        open_tokens = [num_tokens]

        def done() -> None:
            self.tokens[worker_id] -= open_tokens.pop() if open_tokens else 0

        self.tokens[worker_id] += num_tokens
        try:
            yield done
        finally:
            done()

    @contextmanager
    def decoding(self, worker_id: WorkerId) -> Iterator[None]:
        self.requests[worker_id] += 1
        try:
            yield
        finally:
            self.requests[worker_id] -= 1
