"""Who is on a decode worker: waiting, admitted, and in the step that runs.

Knows the stages of `task.py` and the holdings that go with them. Pure: no clock, no events, nothing awaited. What a
request holds has one way in, `admit_next`, and one way out, `remove`.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.decode.memory import DecodeMemory
from packlight.decode.task import Stage, Task
from packlight.engine.compute import Decoding


class Roster:
    """Of one worker, oldest first. `stepping`: whose pages the compute thread reads now."""

    def __init__(self, memory: DecodeMemory) -> None:
        self._memory = memory
        self.queue: list[Task] = []
        self.admitted: list[Task] = []
        self.stepping: Sequence[Task] = ()

    @property
    def num_unfinished(self) -> int:
        return len(self.queue) + len(self.admitted)

    @property
    def decoding(self) -> Decoding:
        """NOW: a step would have something to do. SOON: pages are on their way."""
        if any(task.stage in (Stage.READY, Stage.RUNNING) for task in self.admitted):
            return Decoding.NOW
        return Decoding.SOON if any(task.is_arriving for task in self.admitted) else Decoding.NO

    def admit_next(self) -> Task | None:
        """Who has waited longest, if rows and reservations last: it holds its share now."""
        if not self.queue or not self._memory.open(self.queue[0].holding):
            return None
        self.admitted.append(self.queue.pop(0))
        return self.admitted[-1]

    def join(self) -> list[Task]:
        """The batch of the next step: whose pages are all here."""
        for task in self.admitted:
            if task.stage is Stage.READY:
                task.stage = Stage.RUNNING
        return [task for task in self.admitted if task.stage is Stage.RUNNING]

    def remove(self, task: Task) -> None:
        """Close `task` and what it holds. It must not be in a step."""
        assert task not in self.stepping, "the compute thread still reads its pages"
        if task.stage is Stage.QUEUED:
            self.queue.remove(task)
        else:
            self.admitted.remove(task)
            self._memory.close(task.holding)
        task.stage = Stage.CLOSED
