"""The download job's script against a small hub on loopback: what it fetches, when it is done, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.chart import CHART

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "team/tiny"
WEIGHTS = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": len(WEIGHTS).to_bytes(8, "little") + WEIGHTS + b"\0\0\0\0",
    "original/weights.pth": b"not asked for",
}


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a snapshot takes: the list of files of a revision, and the files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.fetched = files, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in self.files]
            self._answer(json.dumps(tree).encode())
        elif self.path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files]
            self._answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif (name := self.path.partition(f"/resolve/{COMMIT}/")[2]) in self.server.files:
            self._answer(self.server.files[name], name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def files(self) -> list[tuple[str, bytes]]:
        return list(self.server.files.items())

    def _answer(self, data: bytes, name: str | None = None) -> None:
        if name is not None and self.command == "GET":
            self.server.fetched.append(name)
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{_etag(data)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def download(hub: Hub, marker: Path) -> subprocess.CompletedProcess[str]:
    """The job's script, in the job's environment."""
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "MODEL_REPO": REPO,
        "MODEL_REVISION": "main",
        "MODEL_FILES": "*.json *.jinja model*.safetensors",
        "MODEL_MARKER": str(marker),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(marker.parents[1] / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    script = (CHART / "scripts" / "download_model.py").read_text()
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=120)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "tiny" / ".complete-abc"


def test_a_whole_model_is_marked_and_not_fetched_again(marker: Path) -> None:
    with running_hub(MODEL) as hub:
        first = download(hub, marker)
        assert first.returncode == 0, first.stderr
        assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (marker.parent / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
        assert marker.exists()
        second = download(hub, marker)
        assert "there already" in second.stdout
        assert len(hub.fetched) == 3


def test_a_model_that_is_not_whole_is_not_marked(marker: Path) -> None:
    """Pods would wait for ever rather than load it; the job fails, saying what is missing."""
    with running_hub({name: data for name, data in MODEL.items() if name != "tokenizer.json"}) as hub:
        done = download(hub, marker)
    assert done.returncode == 1
    assert "there is no tokenizer.json" in done.stderr
    assert not marker.exists()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
