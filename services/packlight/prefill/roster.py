"""Who is on a prefill worker: waiting, being computed, and read.

Knows the stages of `task.py` and the blocks that go with them. Pure: no clock, no events, nothing awaited. A request
that was begun has one way out of its blocks, `retire`; every request has one way off the worker, `leave`.
"""

from __future__ import annotations

from packlight.prefill.blocks import Blocks
from packlight.prefill.task import Stage, Task


class Roster:
    """Of one worker, oldest first. `max_running`: requests that are computed or read at once."""

    def __init__(self, blocks: Blocks, *, max_running: int) -> None:
        self._blocks, self._max_running = blocks, max_running
        self.queue: list[Task] = []
        self.admitted: list[Task] = []
        self._shipping: set[Task] = set()

    @property
    def uncomputed(self) -> list[Task]:
        """Those of whom something is left to compute."""
        return [*self.queue, *self.admitted]

    @property
    def num_running(self) -> int:
        return len(self.admitted) + len(self._shipping)

    @property
    def num_unfinished(self) -> int:
        return len(self.queue) + self.num_running

    def admit(self, room: int) -> list[Task]:
        """Give blocks to waiting requests, oldest first, as long as a step of `room` tokens has some left, they fit and
        readers keep up. One whose prefix is being computed for another waits until it is there: nothing is computed
        twice."""
        begun: list[Task] = []
        room -= sum(task.num_left for task in self.admitted)
        while self.queue and room > 0 and self.num_running < self._max_running:
            task = self.queue[0]
            if self._blocks.is_coming(task, self.admitted) or not self._blocks.take(task):
                break
            self.queue.pop(0)
            task.stage = Stage.PREFILLING
            self.admitted.append(task)
            begun.append(task)
            room -= task.num_left
        return begun

    def retire(self, task: Task) -> None:
        """Nothing more is computed; what is left is shipping."""
        self.admitted.remove(task)
        self._blocks.retire(task)
        task.stage = Stage.SHIPPING
        self._shipping.add(task)

    def leave(self, task: Task) -> None:
        """Its reader is gone. A step may be computing it: then `drop_cancelled` does the rest."""
        if task.stage is Stage.PREFILLING:
            task.cancelled = True
            return
        if task.stage is Stage.QUEUED:
            self.queue.remove(task)
        self._close(task)

    def drop_cancelled(self) -> None:
        """Between steps: retire and close those whose readers left."""
        for task in [task for task in self.admitted if task.cancelled]:
            self.retire(task)
            self._close(task)

    def _close(self, task: Task) -> None:
        self._shipping.discard(task)
        task.stage = Stage.CLOSED
        if task.sender is not None:
            task.sender.release()
