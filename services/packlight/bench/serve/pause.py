"""Servers that are not being measured, stopped: some poll their cores even when idle.

Knows processes (Linux): SIGSTOP and SIGCONT to a process and all its descendants, found anew each time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def paused(pids: list[int]) -> Iterator[None]:
    """The processes and their descendants stand still meanwhile, and run again afterwards whatever happens."""
    for pid in pids:
        _signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    """Ancestors first: one that is stopped starts no more children. Those that have gone need nothing."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    for child in _children(pid):
        _signal(child, number)


def _children(pid: int) -> list[int]:
    """Of all its threads: each may start processes."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, task.read_text().split())
    return children
