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

from tests.e2e.helpers import (
    ENDLESS,
    LONG_CONTEXT,
    Stream,
    ask,
    begin,
    breaks_in,
    chat,
    client_of,
    expected,
    health_of,
    num_retries,
    request_for,
)
from tests.support.cluster import (
    PATIENCE_S,
    PATIENT,
    SMALL_POOLS,
    START_TIMEOUT_S,
    RunningCluster,
    eventually,
    free_port,
    packlight,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

DRAIN_S = 5
NAMES = {"decode-0", "decode-1", "decode-2"}
NO_COMPILER = ("prefill.attention=sdpa", "decode.attention=sdpa")
SETTINGS = (
    "model.path=fake",
    *SMALL_POOLS,
    *NO_COMPILER,
    *PATIENT,
    LONG_CONTEXT,
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


def ask_to_end(cluster: RunningCluster, name: str) -> float:
    """SIGTERM; when it was about to be sent."""
    asked_at = time.monotonic()
    cluster.signal(name, signal.SIGTERM)
    return asked_at


def wait_for_end(cluster: RunningCluster, name: str) -> float:
    """When the process has ended, with exit code 0."""
    cluster.process.wait_for(rf"{name} ended unasked, with exit code 0\b", PATIENCE_S)
    return time.monotonic()


@contextmanager
def others_keep_asking(cluster: RunningCluster) -> Iterator[None]:
    """Short requests one after the other, some at least; every one of them must get its answer."""
    done, failures, numbers = threading.Event(), list[object](), list[int]()

    def go_on() -> None:
        with client_of(cluster.url) as client:
            while not done.wait(0.01):
                prompt = f"{len(numbers)} of many"
                numbers.append(len(numbers))
                try:
                    tokens, _ = ask(client, prompt, 6)
                except openai.OpenAIError as error:
                    failures.append((error, error.__cause__))
                    continue
                if tokens != expected(prompt, 6, breaks_in(prompt, tokens)):
                    failures.append(tokens)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
        eventually(lambda: len(numbers) > 5)
    finally:
        done.set()
        thread.join()
    assert not failures


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_decode_workers_finish_what_they_can_and_hand_over_the_rest(cluster, client):
    prompt, gives_up = "It has time to finish", f"giving up 1 requests after {DRAIN_S:.0f} s"
    stream, first = begin(cluster, client, prompt, 300, among=sorted(NAMES))
    with others_keep_asking(cluster):
        ask_to_end(cluster, first)
        tokens = stream.read_all()
        wait_for_end(cluster, first)
    breaks = breaks_in(prompt, tokens)
    assert tokens == expected(prompt, 300, breaks)
    assert not breaks or gives_up in cluster.process.output, "it had the time, unless somebody was paused for long"

    prompt, num_before = "It has no time to finish", num_retries(cluster)
    stream, second = begin(cluster, client, prompt, ENDLESS, among=sorted(NAMES - {first}))
    with others_keep_asking(cluster), ThreadPoolExecutor(1) as pool:
        has_ended = threading.Event()
        asked_at, so_far = ask_to_end(cluster, second), pool.submit(stream.read_beyond, has_ended)
        ended_at = wait_for_end(cluster, second)
        has_ended.set()
        tokens = so_far.result()
    stream.leave()
    breaks = breaks_in(prompt, tokens)
    assert tokens == expected(prompt, len(tokens), breaks)
    assert len(breaks) <= 1
    assert num_retries(cluster) > num_before
    assert ended_at - asked_at >= DRAIN_S
    assert gives_up in cluster.process.output


def test_a_prefill_worker_leaves_without_a_trace(cluster, client):
    with others_keep_asking(cluster):
        ask_to_end(cluster, "prefill-0")
        wait_for_end(cluster, "prefill-0")
        eventually(lambda: health_of(cluster.url)["details"]["workers"]["prefill"] == 1)


# ── the router ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_router_refuses_what_comes_and_finishes_what_came(cluster, client):
    prompt = "The last answer of this router"
    stream, endless = Stream(client, prompt, 300), Stream(client, "The router stays for it", ENDLESS)
    stream.read(10)
    ask_to_end(cluster, "router")
    eventually(lambda: health_of(cluster.url)["draining"])
    health = httpx.get(f"{cluster.url}/health/ready", trust_env=False, timeout=PATIENCE_S)
    assert (health.status_code, health.json()["ready"]) == (503, False)
    refused = chat(cluster.url, request_for("Too late", 5))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert stream.read_all() == expected(prompt, 300)
    endless.leave()
    wait_for_end(cluster, "router")


def test_a_router_ends_with_an_error_what_it_cannot_finish():
    """Not by hanging up: the last event says what happened, and that trying again helps."""
    port = free_port()
    settings = (
        "model.path=fake",
        *SMALL_POOLS,
        *NO_COMPILER,
        LONG_CONTEXT,
        f"router.port={port}",
        "router.drain_s=0.5",
    )
    with running_process(packlight("serve", *settings)) as process:
        process.wait_for(r"(?m)^ready: ")
        with client_of(f"http://127.0.0.1:{port}") as client:
            stream = Stream(client, "It is cut short", ENDLESS)
            stream.read(10)
            process.popen.terminate()
            with pytest.raises(openai.APIError, match="shutting down"):
                stream.read_all()
        assert process.popen.wait(START_TIMEOUT_S) == 0
        assert "giving up 1 requests after 0.5 s" in process.output
        assert "Traceback" not in process.output
