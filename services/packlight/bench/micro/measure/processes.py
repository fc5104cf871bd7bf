"""Worker processes of a benchmark: started, watched for their address, asked for their CPU time, and ended.

Knows processes and /proc. Each dies with the benchmark, however that ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from packlight.core.errors import StartupError

START_TIMEOUT_S = 300.0  # a first start may compile the kernels
_READY = re.compile(r"is ready on (\S+:\d+)")


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker that listens at `address`."""

    pid: int
    address: str

    def cpu_s(self) -> float:
        """User and system time of the process so far; NaN where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def worker_process(module: str, *arguments: str) -> Iterator[WorkerProcess]:
    """`python -m module arguments`, once it has said where it listens. Raises StartupError with its last words."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [*die_with_parent(), sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        try:
            yield WorkerProcess(process.pid, _address(process, said))
        finally:
            process.terminate()


def packlight_role(role: str, settings: Sequence[str]) -> tuple[str, ...]:
    """The arguments of `worker_process` for `packlight <role>`."""
    return ("packlight", role, *(word for setting in settings for word in ("--set", setting)))


def _address(process: subprocess.Popen[bytes], said: BinaryIO) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        has_ended = process.poll() is not None
        text = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
        if (found := _READY.search(text)) is not None:
            return found[1]
        if has_ended or time.monotonic() > deadline:
            why = f"ended with {process.returncode}" if has_ended else f"was not ready after {START_TIMEOUT_S:.0f} s"
            raise StartupError(f"a worker process {why}: {text[-2000:]}")
        time.sleep(0.02)


def die_with_parent() -> list[str]:
    """A prefix to the command: the kernel ends it when this process ends, however it does (Linux)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
