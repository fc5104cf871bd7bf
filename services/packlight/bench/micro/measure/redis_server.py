"""A Redis server for a benchmark: the one that is named, or one of our own on a free port of loopback.

Knows processes. The server keeps nothing on disk and ends with the benchmark.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from packlight.bench.micro.measure.processes import die_with_parent
from packlight.core.errors import StartupError

START_TIMEOUT_S = 20.0


@contextmanager
def redis_server(environ: Mapping[str, str]) -> Iterator[str]:
    """Its URL. Raises StartupError if there is neither `REDIS_URL` nor a `redis-server` or `valkey-server` to start."""
    if url := environ.get("REDIS_URL"):
        yield url
        return
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise StartupError("no redis-server or valkey-server on PATH: install one, or set REDIS_URL")
    port = _free_port()
    place, no_disk = ["--port", str(port), "--bind", "127.0.0.1"], ["--save", "", "--appendonly", "no"]
    command = [*die_with_parent(), binary, *place, *no_disk]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartupError(f"redis-server did not come up on port {port}") from None
            time.sleep(0.01)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
