"""SIGTERM to one process after another, in mid-stream: who finishes, who hands over, and that no client notices.

The tests build on one another: each leaves a cluster with one process less.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from tests.e2e.helpers import Stream, ask, breaks_in, client_of, expected, health_of, request_for
from tests.support.cluster import (
    SMALL_POOLS,
    RunningCluster,
    eventually,
    free_port,
    packlight,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

DRAIN_S, LONG = 2, 3500
NO_COMPILER = ("prefill.attention=sdpa", "decode.attention=sdpa")
SETTINGS = (
    "model.path=fake",
    *SMALL_POOLS,
    *NO_COMPILER,
    "index.timeout_s=0.25",
    f"decode.drain_s={DRAIN_S}",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster(
        "--keep-going", "--decode", "3", *(flag for setting in SETTINGS for flag in ("--set", setting))
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with client_of(cluster.url) as client:
        yield client


def decode_of(cluster: RunningCluster, *gone: str) -> str:
    """The worker that answers the only request."""
    living = {"decode-0", "decode-1", "decode-2"} - set(gone)
    (name,) = (name for name in living if cluster.metrics(name)["packlight_decode_running_requests"] == 1)
    return name


def ask_to_end(cluster: RunningCluster, name: str) -> float:
    """SIGTERM; when it was sent."""
    cluster.signal(name, signal.SIGTERM)
    return time.monotonic()


def wait_for_end(cluster: RunningCluster, name: str) -> float:
    """When the process has ended, with exit code 0."""
    cluster.process.wait_for(rf"{name} ended unasked, with exit code 0\b", timeout_s=15)
    return time.monotonic()


@contextmanager
def others_keep_asking(cluster: RunningCluster) -> Iterator[None]:
    """Short requests one after the other; every one of them must get its answer."""
    done, failures, numbers = threading.Event(), list[object](), list[int]()

    def go_on() -> None:
        with client_of(cluster.url) as client:
            while not done.wait(0.01):
                prompt = f"{len(numbers)} of many"
                numbers.append(len(numbers))
                try:
                    tokens, _ = ask(client, prompt, 6)
                except openai.OpenAIError as error:
                    failures.append(error)
                    continue
                if tokens != expected(prompt, 6, breaks_in(prompt, tokens)):
                    failures.append(tokens)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not failures
    assert len(numbers) > 5


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_decode_workers_finish_what_they_can_and_hand_over_the_rest(cluster, client):
    prompt = "It has time to finish"
    stream = Stream(client, prompt, 200)
    stream.read(10)
    first = decode_of(cluster)
    with others_keep_asking(cluster):
        ask_to_end(cluster, first)
        assert stream.read_all() == expected(prompt, 200)
        wait_for_end(cluster, first)

    prompt = "It has no time to finish"
    stream = Stream(client, prompt, LONG)
    stream.read(10)
    second = decode_of(cluster, first)
    with others_keep_asking(cluster), ThreadPoolExecutor(1) as pool:
        asked_at, rest = ask_to_end(cluster, second), pool.submit(stream.read_all)
        ended_at = wait_for_end(cluster, second)
        tokens = rest.result()
    assert tokens == expected(prompt, LONG, breaks_in(prompt, tokens))
    assert stream.finish_reason == "length"
    assert ended_at - asked_at >= DRAIN_S
    assert f"giving up 1 requests after {DRAIN_S:.0f} s" in cluster.process.output


def test_a_prefill_worker_leaves_without_a_trace(cluster, client):
    with others_keep_asking(cluster):
        ask_to_end(cluster, "prefill-0")
        wait_for_end(cluster, "prefill-0")
        eventually(lambda: health_of(cluster.url)["details"]["workers"]["prefill"] == 1)


# ── the router ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_router_refuses_what_comes_and_finishes_what_came(cluster, client):
    prompt = "The last answer of this router"
    stream = Stream(client, prompt, 2000)
    stream.read(10)
    ask_to_end(cluster, "router")
    eventually(lambda: health_of(cluster.url)["draining"])
    health = httpx.get(f"{cluster.url}/health/ready", trust_env=False)
    assert (health.status_code, health.json()["ready"]) == (503, False)
    refused = httpx.post(f"{cluster.url}/v1/chat/completions", json=request_for("Too late", 5), trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert stream.read_all() == expected(prompt, 2000)
    wait_for_end(cluster, "router")


def test_a_router_ends_with_an_error_what_it_cannot_finish():
    """Not by hanging up: the last event says what happened, and that trying again helps."""
    port = free_port()
    settings = ("model.path=fake", *SMALL_POOLS, *NO_COMPILER, f"router.port={port}", "router.drain_s=0.5")
    with running_process(packlight("serve", *settings)) as process:
        process.wait_for(r"(?m)^ready: ")
        with client_of(f"http://127.0.0.1:{port}") as client:
            stream = Stream(client, "It is cut short", LONG)
            stream.read(10)
            process.popen.terminate()
            with pytest.raises(openai.APIError, match="shutting down"):
                stream.read_all()
        assert process.popen.wait(30) == 0
        assert "giving up 1 requests after 0.5 s" in process.output
        assert "Traceback" not in process.output
