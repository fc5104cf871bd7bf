"""The rendered pods' own commands, settings and probes, as processes on this machine around the arithmetic model.

Only what a pod has and this machine has not is replaced: the pods' network (by loopback and free ports), the place of
the mounted config, and the model.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deploy.chart import CHART, ROOT
from packlight.core.config import FleetConfig
from packlight.fleet.base import FleetAway
from packlight.fleet.registry import build_fleet
from tests.deploy.support import Object, container, objects, pick, pod_spec
from tests.support.cluster import SMALL_POOLS, Process, eventually, free_port, running_process
from tests.support.redis_servers import find_binary

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


class Pod:
    """One container of the chart, running."""

    def __init__(self, box: Object, process: Process, ports: dict[str, int]) -> None:
        self._box, self.process, self._ports = box, process, ports

    def url(self, path: str, port: str) -> str:
        return f"http://127.0.0.1:{self._ports[port]}{path}"

    def passes(self, kind: str) -> bool:
        """What the kubelet would find."""
        probe = self._box[kind]
        if "tcpSocket" in probe:
            return _connects(self._ports[probe["tcpSocket"]["port"]])
        return _status(self.url(probe["httpGet"]["path"], probe["httpGet"]["port"])) < 400


class Machine:
    """Where the pods run: one rendered release and a Redis."""

    def __init__(self, items: list[Object], folder: Path, redis_url: str) -> None:
        self._items, self._redis_url = items, redis_url
        self._config = folder / "packlight.yaml"
        self._config.write_text(pick(items, "ConfigMap", "config")["data"]["packlight.yaml"])

    @contextmanager
    def pod(self, role: str, **environment: str) -> Iterator[Pod]:
        """`environment` differs from the chart's."""
        box = container(self._items, role)
        ports = {port["name"]: free_port() for port in box["ports"]}
        names = {"http": "port", "grpc": "port", "metrics": "metrics_port"}
        settings = [f"{role}.{names[name]}={number}" for name, number in ports.items()]
        settings += [f"{role}.host=127.0.0.1", "model.path=fake", *SMALL_POOLS]
        arguments = [argument.replace("/etc/packlight/packlight.yaml", str(self._config)) for argument in box["args"]]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        environ = {entry["name"]: entry["value"] for entry in box["env"] if "value" in entry}
        environ |= {"POD_NAME": f"{role}-abc", "POD_IP": "127.0.0.1", "REDIS_URL": self._redis_url, **environment}
        with running_process([sys.executable, "-m", "packlight", *arguments, *flags], environ) as process:
            yield Pod(box, process, ports)


@pytest.fixture
def redis_url() -> Iterator[str]:
    """The bundled Redis's own command and probe, with a password, by whichever of the two engines is here."""
    binary, cli, port = find_binary("redis"), shutil.which("redis-cli"), free_port()
    if binary is None or cli is None:
        pytest.skip("needs redis-server and redis-cli: apt-get install redis-server")
    box = container(objects("everything"), "redis")
    secret = {"REDIS_PASSWORD": "pass-word_1"}
    (script,) = box["args"]
    command = [*box["command"], script.replace("valkey-server", f"{binary} --port {port}")]
    check = [word.replace("valkey-cli", f"{cli} -p {port}") for word in box["readinessProbe"]["exec"]["command"]]
    with running_process(command, secret):
        eventually(lambda: subprocess.run(check, env={**os.environ, **secret}).returncode == 0)
        assert subprocess.run(check, env={**os.environ, "REDIS_PASSWORD": "wrong"}).returncode != 0
        yield f"redis://:{secret['REDIS_PASSWORD']}@127.0.0.1:{port}/0"


def test_a_release_gets_ready_answers_and_ends(redis_url: str, tmp_path: Path) -> None:
    items = objects("default")
    machine = Machine(items, tmp_path, redis_url)
    with ExitStack() as stack:
        router = stack.enter_context(machine.pod("router"))
        prefill, decode = (stack.enter_context(machine.pod(role)) for role in ("prefill", "decode"))
        eventually(lambda: router.passes("startupProbe"), timeout_s=60)
        assert router.passes("livenessProbe")
        for worker in (prefill, decode):
            eventually(lambda worker=worker: worker.passes("startupProbe"), timeout_s=120)
            eventually(lambda worker=worker: worker.passes("readinessProbe") and worker.passes("livenessProbe"))
        eventually(lambda: router.passes("readinessProbe"))

        url = router.url("", "http")
        asked = _script(pick(items, "Pod")["spec"]["containers"][0]["args"][0], PACKLIGHT_URL=url)
        assert asked.returncode == 0, asked.stdout + asked.stderr
        checked = _health(f"{url}/health/ready")
        assert checked.returncode == 0
        assert '"ready":true' in checked.stdout.replace(" ", "")
        assert _health(decode.url("/metrics", "metrics")).stdout == "ok\n"

        assert decode.process.end() == 0
        eventually(lambda: not router.passes("readinessProbe"), what="ready without a decode worker")
        assert router.passes("livenessProbe"), "a restart would not help"
        refused = _health(f"{url}/health/ready")
        assert refused.returncode == 1
        assert '"decode":0' in refused.stdout.replace(" ", ""), "it says what is missing"
        assert router.process.end() == 0
        assert prefill.process.end() == 0


def test_a_router_without_workers_lives_and_is_not_ready(redis_url: str, tmp_path: Path) -> None:
    with Machine(objects("default"), tmp_path, redis_url).pod("router") as router:
        eventually(lambda: router.passes("startupProbe"), timeout_s=60)
        assert router.passes("livenessProbe")
        assert not router.passes("readinessProbe")
        asked = _script(
            (CHART / "scripts" / "ask.py").read_text().replace("600.0", "0.0"), PACKLIGHT_URL=router.url("", "http")
        )
        assert asked.returncode == 1
        assert "not ready" in asked.stderr


def test_workers_of_different_revisions_are_not_paired(redis_url: str, tmp_path: Path) -> None:
    """In the middle of an upgrade: a new prefill worker, an old decode worker, then a new one."""
    machine = Machine(objects("default"), tmp_path, redis_url)
    with ExitStack() as stack:
        router, *_ = (stack.enter_context(machine.pod(role)) for role in ("router", "prefill"))
        stack.enter_context(machine.pod("decode", POD_REVISION="before", POD_NAME="decode-before"))
        both = '"workers":{"prefill":1,"decode":1}'
        eventually(lambda: both in _text(router.url("/health/ready", "http")), timeout_s=120)
        assert not router.passes("readinessProbe")
        stack.enter_context(machine.pod("decode"))
        eventually(lambda: router.passes("readinessProbe"), timeout_s=120)


def test_waiting_for_a_model_ends_when_it_is_asked_to() -> None:
    """By its own doing: what a signal does otherwise, it does not do to the first process of a container."""
    (waiting,) = pod_spec(objects("h100"), "decode")["initContainers"]
    with running_process(waiting["command"]) as process:
        process.wait_for("waiting for /models/qwen3-8b/")
        assert process.end() == 1


def test_the_health_check_of_a_process_that_is_not_there() -> None:
    checked = _health(f"http://127.0.0.1:{free_port()}/health/ready")
    assert checked.returncode == 1
    assert "refused" in checked.stdout


async def test_an_external_redis_with_tls_and_a_password(tmp_path: Path) -> None:
    """The address of the chart's README: an authority of one's own, named in the address."""
    binary, port = find_binary("redis"), free_port()
    if binary is None:
        pytest.skip("needs redis-server: apt-get install redis-server")
    authority, key = _authority(tmp_path)
    files = ["--tls-cert-file", str(authority), "--tls-key-file", str(key), "--tls-ca-cert-file", str(authority)]
    ports = ["--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--tls-auth-clients", "no"]
    with running_process([binary, *ports, *files, "--requirepass", "secret", "--save", ""]) as process:
        process.wait_for("Ready to accept connections")
        url = f"rediss://:secret@127.0.0.1:{port}/0"
        assert await _is_reachable(f"{url}?ssl_ca_certs={authority}")
        assert not await _is_reachable(url), "signed by nobody we know"


def _authority(folder: Path) -> tuple[Path, Path]:
    """A certificate for loopback that signs itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl: apt-get install openssl")
    certificate, key = folder / "ca.crt", folder / "tls.key"
    self_signed = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=redis"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *self_signed, *names], check=True, capture_output=True)
    return certificate, key


async def _is_reachable(url: str) -> bool:
    fleet = build_fleet(FleetConfig(backend="redis"), {"REDIS_URL": url}, time.monotonic)
    try:
        await fleet.list()
    except FleetAway:
        return False
    finally:
        await fleet.close()
    return True


def _health(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "healthcheck.py")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PACKLIGHT_HEALTH_URL": url})


def _script(text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environ, timeout=120)


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _status(url: str) -> int:
    return _get(url)[0]


def _text(url: str) -> str:
    return _get(url)[1].replace(" ", "")


def _get(url: str) -> tuple[int, str]:
    """(status, body); 599 without a server."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as reply:
            return int(reply.status), reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 599, ""
