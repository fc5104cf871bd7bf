"""Servers that are started for a run and ended after it: `packlight serve`, or the cluster of `deploy/cluster.py`.

Knows commands and the line in which each says that it is ready. Both listen on free ports of this machine, and
both die with this process, however it ends (Linux).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.cluster import die_with_parent
from loadtest.verdict import ServerUnreachable

CLUSTER = Path(__file__).parents[1] / "deploy" / "cluster.py"
_READY = re.compile(r"ready: .*?(http://[^/\s]+)")
_START_TIMEOUT_S, _END_TIMEOUT_S, _POLL_S = 300.0, 120.0, 0.1
_TOLD_CHARS = 2000


@contextmanager
def embedded(settings: Sequence[str]) -> Iterator[str]:
    """Router, prefill and decode in one process; its URL. Raises ServerUnreachable with its last words."""
    with _running([sys.executable, "-m", "packlight", "serve", *_flags(["router.port=0", *settings])]) as url:
        yield url


@contextmanager
def cluster(settings: Sequence[str]) -> Iterator[str]:
    """Redis, a router, two prefill and two decode workers. As above."""
    with _running([sys.executable, str(CLUSTER), "--port", "0", *_flags(settings)]) as url:
        yield url


def _flags(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """Output goes to a file: a pipe that nobody empties would stop the server."""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.NamedTemporaryFile(prefix="packlight-load-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        try:
            yield _wait_until_ready(process, Path(log.name))
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        said = log.read_text(errors="replace")
        if ready := _READY.search(said):
            return ready[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerUnreachable(f"the server did not get ready; it said:\n{said[-_TOLD_CHARS:]}")
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
