"""One process with a limit: what it says is passed on line by line, and when it is over nothing of it is left."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_POLL_S = 1.0


def run(
    command: Sequence[str],
    *,
    limit_s: float,
    ends_at: float,
    hear: Callable[[str], bool],
    cwd: Path,
    environ: Mapping[str, str],
) -> int | None:
    """Its exit status; None if it was ended at its limit, or at the time `ends_at` of the monotonic clock. Raises
    OSError if there is no such program.

    `hear` gets each line of its output; where it says True, `limit_s` begins anew."""
    process = subprocess.Popen(
        list(command),
        cwd=cwd,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # compilers that it started are ended with it
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        return _follow(process, lines, limit_s, ends_at, hear)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(_POLL_S)


def _follow(
    process: subprocess.Popen[str],
    lines: queue.SimpleQueue[str | None],
    limit_s: float,
    ends_at: float,
    hear: Callable[[str], bool],
) -> int | None:
    late_at = min(ends_at, time.monotonic() + limit_s)
    while (left_s := late_at - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(_POLL_S, left_s))
        except queue.Empty:
            if process.poll() is not None:  # what it left behind holds its output open
                return process.returncode
            continue
        if line is None:
            return _status(process, late_at - time.monotonic())
        if hear(line):
            late_at = min(ends_at, time.monotonic() + limit_s)
    return None


def _status(process: subprocess.Popen[str], limit_s: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, limit_s))
    return None


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
