"""The README runs: the server it starts, the curl it shows, the Python it shows."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
README = Path(__file__).parents[2] / "README.md"
PORT_IN_README = "127.0.0.1:8000"


def blocks(language=""):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def server():
    """`packlight serve`, as `make serve` starts it, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "packlight", "serve", "--set", f"router.port={address.split(':')[1]}"]
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # see tests/conftest.py
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://{address}/health/ready", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        assert process.poll() is None, process.stdout.read()
        yield address
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert f"ready: smollm2 at http://{address}/v1" in output
    finally:
        process.kill()
        process.wait()


def test_the_curl_answers(server):
    (curl,) = [block for block in blocks() if block.startswith("curl")]
    done = subprocess.run(
        ["bash", "-c", "curl -sS" + curl.removeprefix("curl").replace(PORT_IN_README, server)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "Paris" in done.stdout


def test_the_python_answers(server):
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code.replace(PORT_IN_README, server)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "'recipe': 'snapkv'" in done.stdout
