"""Real processes for tests, and gRPC servers on loopback: started, killed, frozen, and gone with the test run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import SystemRandom
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from packlight.core.credentials import CredentialFiles
from packlight.core.shipping import PrefillClient, PrefillEvent
from packlight.core.types import PrefillRequest
from packlight.wire.channel import Channels, Dialer, start_server
from tests.support.redis_servers import find_binary

CLUSTER = Path(__file__).parents[2] / "deploy" / "cluster.py"
REMOTE_ONLY = "decode.local_prefill.kv_memory_bytes=0"
"""Every prompt goes from worker to worker, however short: most tests are about that way."""
SMALL_POOLS = ("prefill.kv_memory_bytes=16777216", "decode.kv_memory_bytes=16777216", REMOTE_ONLY)
PATIENT = ("index.timeout_s=5", "fleet.ttl_s=30")
"""For tests in which nobody is to be given up: a process that a busy machine pauses for seconds is not dead."""
START_TIMEOUT_S = 120.0  # importing torch several times at once on a busy machine
PATIENCE_S = 60.0
"""For what happens at once on an idle machine. Only what never happens takes so long."""
FIRST_PORT, LAST_PORT = 10_000, 19_000
"""Below those that kernels hand out, and those that Redis clusters are given."""


@dataclass
class LoopbackServer:
    """A gRPC server of this process that can be ended and started again on the same port."""

    handler: grpc.GenericRpcHandler
    server: grpc.aio.Server
    port: int
    tls: CredentialFiles | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """At once: what is in progress ends as if the process had gone."""
        await self.server.stop(None)

    async def start_again(self) -> None:
        self.server, _ = await start_server([self.handler], "127.0.0.1", self.port, self.tls)


@asynccontextmanager
async def loopback(
    handler: grpc.GenericRpcHandler, tls: CredentialFiles | None = None
) -> AsyncIterator[tuple[LoopbackServer, grpc.aio.Channel]]:
    """A server around `handler`, and a channel to it, both as the processes make them."""
    server, port = await start_server([handler], "127.0.0.1", 0, tls)
    loopback_server, channels = LoopbackServer(handler, server, port, tls), Channels(Dialer(tls))
    try:
        yield loopback_server, channels.get(loopback_server.address)
    finally:
        await channels.close()
        await loopback_server.stop()


class Later:
    """A prefill client that is decided on once there is a server to reach."""

    target: PrefillClient

    def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        return self.target.prefill(request)


class Process:
    """A process whose output is kept in a file. It dies with the test run (Linux; elsewhere `end` must do)."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        descriptor, self._log = tempfile.mkstemp(prefix="packlight-test-", suffix=".log")
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
        self.popen = subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **(environ or {})},
            start_new_session=True,
        )
        os.close(descriptor)

    @property
    def output(self) -> str:
        return Path(self._log).read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first place in the output where `pattern` is found, once it is there."""
        deadline = time.monotonic() + timeout_s
        while True:
            is_last = time.monotonic() > deadline or self.popen.poll() is not None  # before what it says is read
            if (found := re.search(pattern, self.output)) is not None:
                return found
            assert not is_last, f"no {pattern!r} in the output:\n{self.output[-5000:]}"
            time.sleep(0.02)

    def end(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """SIGTERM, and the exit code."""
        self.popen.terminate()
        return self.popen.wait(timeout_s)

    def remove(self) -> None:
        """Nothing is left of it."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        Path(self._log).unlink(missing_ok=True)


@contextmanager
def running_process(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Iterator[Process]:
    process = Process(command, environ)
    try:
        yield process
    finally:
        process.remove()


@contextmanager
def running_worker(role: str, *settings: str) -> Iterator[tuple[Process, str]]:
    """A worker process around the arithmetic model, alone in its fleet; its address."""
    with running_process(packlight(role, "model.path=fake", *SMALL_POOLS, *settings)) as process:
        yield process, process.wait_for(r"is ready on (\S+:\d+)")[1]


def packlight(role: str, *settings: str) -> list[str]:
    return [sys.executable, "-m", "packlight", role, *(flag for setting in settings for flag in ("--set", setting))]


class RunningCluster:
    """A cluster that `deploy/cluster.py` runs."""

    def __init__(self, process: Process, port: int) -> None:
        self.process, self.port = process, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pid(self, name: str) -> int:
        return int(self.process.wait_for(rf"(?m)^{name} +\| pid (\d+)$")[1])

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"(?m)^\S+ +\| pid (\d+)$", self.process.output)]

    def kill(self, name: str) -> None:
        """SIGKILL, and noticed by the cluster when this returns."""
        os.kill(self.pid(name), signal.SIGKILL)
        self.process.wait_for(rf"{name} ended unasked", PATIENCE_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.pid(name), number)

    @cached_property
    def redis_url(self) -> str:
        environ = Path(f"/proc/{self.pid('router')}/environ").read_bytes().split(b"\0")
        return next(entry for entry in environ if entry.startswith(b"REDIS_URL=")).decode().removeprefix("REDIS_URL=")

    def metrics(self, name: str) -> dict[str, float]:
        """The samples of a worker or the router, labels and all, as `name{label=value}`."""
        url = f"{self.url}/metrics"
        if name != "router":
            url = self.process.wait_for(rf"(?m)^{name} +\| .* metrics on (http://\S+)$")[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=PATIENCE_S) as reply:
            text = reply.read().decode()
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def running_cluster(*arguments: str) -> Iterator[RunningCluster]:
    """`deploy/cluster.py`, ready. `arguments` are its own."""
    port = free_port()
    command = [sys.executable, str(CLUSTER), "--port", str(port), *arguments]
    with running_process(command) as process:
        process.wait_for(r"(?m)^cluster +\| ready: ")
        yield RunningCluster(process, port)


@contextmanager
def redis_on(url: str) -> Iterator[Process]:
    """A Redis in place of one that was killed: empty, at the same address."""
    port, binary = url.partition("127.0.0.1:")[2].partition("/")[0], find_binary("redis") or find_binary("valkey")
    assert binary is not None
    cache = ["--save", "", "--appendonly", "no"]
    with running_process([binary, "--port", port, "--bind", "127.0.0.1", *cache]) as process:
        process.wait_for("Ready to accept connections")
        yield process


def free_port() -> int:
    """For a process that listens on it seconds later: not one of those that anybody else may be given meanwhile."""
    while True:
        port = SystemRandom().randint(FIRST_PORT, LAST_PORT)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition: Any, timeout_s: float = PATIENCE_S, what: str = "") -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + timeout_s
    while True:
        is_last = time.monotonic() > deadline  # whoever is paused between two looks gets another one
        if condition():
            return
        assert not is_last, what or "it did not happen in time"
        time.sleep(0.02)
