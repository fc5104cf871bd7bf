"""The first process of a worker that is in several: it leads the others.

Knows how the group is brought together and what happens when it breaks. A rank that raises or dies inside a step leaves
the others inside a sum, so the group cannot be used again: everything after that fails at once, and `watch` ends the
worker. Called on the compute thread, except where it says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from packlight.core.config import Config
from packlight.core.errors import InternalError, WorkerLost
from packlight.engine.parallel.followers import Followers
from packlight.engine.parallel.group import Group, Meeting, open_store
from packlight.engine.parallel.messages import Kind, Message
from packlight.engine.parallel.rank import Rank, rank_device
from packlight.models.opened import OpenedModel

WATCH_PERIOD_S = 0.2


class Crew:
    """The processes of all ranks, this one included, and the models that they have loaded."""

    def __init__(self, config: Config, num_ranks: int, threads: int | None, *, timeout_s: float = 60.0) -> None:
        """`timeout_s` is how long one rank waits for another inside a step. Raises StartupError if a follower ends."""
        self._failure: Exception | None = None
        self._culprit: int | None = None
        self._num_models = self._num_runners = 0
        store = open_store()
        self.followers = Followers(num_ranks, timeout_s)
        with self._or_end():
            for rank in self.followers.ranks:
                numbers = {"rank": rank, "num_ranks": num_ranks, "port": store.port, "threads": threads or 0}
                numbers |= {"timeout_ms": round(timeout_s * 1000)}
                self.followers.tell(rank, Message(Kind.OPEN, numbers, text=config.model_dump_json()))
            self._meeting = Meeting(store, 0, num_ranks, self.followers.check_started)
            self._meeting.meet("started")
            self.group = Group(store, 0, num_ranks, rank_device(config.model.device, 0), timeout_s)

    @property
    def num_ranks(self) -> int:
        return self.group.num_ranks

    def load(self, opened: OpenedModel, config: Config, on_progress: Callable[[str], None]) -> Rank:
        """Every rank loads its share of a model; this one's. Not while the event loop has anything to do. Raises
        StartupError if a follower ends, ModelError if the model cannot be divided: that is the end of the crew."""
        with self._or_end():
            self.followers.tell_all(Message(Kind.LOAD, text=config.model_dump_json()))
            rank = Rank(opened, config, self._num_models, self.group, self._meeting, on_progress)
        self._num_models += 1
        return rank

    def open_runner(self, kind: Kind, rank: Rank, attention: str, numbers: dict[str, int]) -> int:
        """Every follower makes a runner of the model of `rank`; its number. The caller makes this rank's."""
        self.followers.tell_all(Message(kind, {"model": rank.model_number, **numbers}, text=attention))
        self._num_runners += 1
        return self._num_runners - 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do at the same time. Whatever goes wrong within is the end of the group: it raises
        WorkerLost, and so does everything after it."""
        if self._failure is not None:
            raise WorkerLost(f"a rank of this worker failed before: {self._failure!r}")
        try:
            yield
        except Exception as error:
            # Afterwards all have ended; of one that is frozen nobody can tell which it is.
            self._failure, self._culprit = error, self.followers.lost
            self.followers.kill()
            raise WorkerLost(f"a rank of this worker failed: {error!r}") from error

    async def watch(self) -> None:
        """On the event loop, for ever: raises InternalError when a follower is gone."""
        while True:
            if self._failure is not None:
                which = "a rank" if self._culprit is None else f"rank {self._culprit}"
                raise InternalError(f"{which} of this worker failed, and the others with it: {self._failure!r}")
            if (lost := self.followers.lost) is not None:
                raise InternalError(f"rank {lost} of this worker is gone: a part of the model is missing")
            await asyncio.sleep(WATCH_PERIOD_S)

    def close(self) -> None:
        self.followers.close()
        self.group.close()

    @contextmanager
    def _or_end(self) -> Iterator[None]:
        """Around what starts the others: if it fails they end."""
        try:
            yield
        except BaseException:
            self.followers.kill()
            self.followers.close()
            raise
