"""The other processes of a worker: started, told what to do, watched, and gone with it.

Knows processes and pipes. A follower reads messages from its standard input: when that ends it ends, so it outlives the
first process by no more than the step it is in. Nothing is read from a follower but whether it lives. One that does not
read is given up: a pipe holds little, and who waits for it waits for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from typing import IO, BinaryIO

from packlight.core.errors import StartupError, WorkerLost
from packlight.engine.parallel.messages import Message, encoded

MODULE = "packlight.engine.parallel"
END_TIMEOUT_S = 10.0


class Followers:
    """Ranks 1 to `num_ranks - 1`. Each takes what it is told within `timeout_s`."""

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # In a session of their own: an interrupt at the terminal is the first process's to handle.
        self._processes = [
            subprocess.Popen([sys.executable, "-m", MODULE], stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
            for _ in range(1, num_ranks)
        ]
        for rank in self.ranks:
            os.set_blocking(self._pipe(rank).fileno(), False)

    @property
    def ranks(self) -> range:
        return range(1, len(self._processes) + 1)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def tell(self, rank: int, message: Message) -> None:
        """Raises WorkerLost if it is gone, or does not read."""
        try:
            self._write(self._pipe(rank).fileno(), encoded(message))
        except TimeoutError:
            raise WorkerLost(
                f"rank {rank} of this worker took nothing for {self._timeout_s:g} s (rank_timeout_s)"
            ) from None
        except (OSError, ValueError):
            raise WorkerLost(f"rank {rank} of this worker is gone") from None

    def tell_all(self, message: Message) -> None:
        for rank in self.ranks:
            self.tell(rank, message)

    def check_started(self) -> None:
        """Raises StartupError if one has ended."""
        for rank, process in zip(self.ranks, self._processes, strict=True):
            if process.poll() is not None:
                raise StartupError(
                    f"rank {rank} ended with code {process.returncode} while it started: its log says why"
                )

    @property
    def lost(self) -> int | None:
        """A rank that has ended."""
        return next((rank for rank, p in zip(self.ranks, self._processes, strict=True) if p.poll() is not None), None)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Ask all to end, and make sure."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                self._pipe(rank).close()
        for process in self._processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _write(self, pipe: int, data: bytes) -> None:
        """Raises TimeoutError when there was no room for too long."""
        rest, room = memoryview(data), select.poll()
        room.register(pipe, select.POLLOUT)
        while rest:
            if not room.poll(self._timeout_s * 1000):
                raise TimeoutError
            rest = rest[os.write(pipe, rest) :]

    def _pipe(self, rank: int) -> IO[bytes]:
        pipe = self._processes[rank - 1].stdin
        assert pipe is not None
        return pipe


def take_input() -> BinaryIO:
    """A follower's end of the pipe. What else reads standard input finds it empty."""
    pipe = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    return pipe
