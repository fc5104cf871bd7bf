"""A cluster that loses its parts one after another, and what its clients notice of it: as little as possible.

The tests build on one another: each leaves a cluster with fewer parts, which still serves.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from packlight.core.config import IndexConfig
from packlight.core.hashing import page_hashes
from packlight.models.fake_spec import fake_spec
from packlight.prefix.registry import build_index
from tests.e2e.helpers import (
    ENDLESS,
    LONG_CONTEXT,
    NUM_READ,
    Stream,
    ask,
    begin,
    breaks_in,
    client_of,
    expected,
    health_of,
    num_retries,
)
from tests.support.cluster import SMALL_POOLS, RunningCluster, eventually, is_alive, redis_on, running_cluster

pytestmark = pytest.mark.e2e

SETTINGS = ("model.path=fake", *SMALL_POOLS, LONG_CONTEXT, "index.timeout_s=5")
NUM_TOKENS = 2500
SOON_S = 30.0  # a connection to a frozen process ends after a minute if nobody cares


@pytest.fixture(scope="module")
def cluster():
    with running_cluster("--keep-going", *(flag for setting in SETTINGS for flag in ("--set", setting))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with client_of(cluster.url) as client:
        yield client


@pytest.fixture(scope="module")
def new_redis(cluster):
    """What takes the killed Redis's place, for the rest of the module."""
    with redis_on(cluster.redis_url) as process:
        yield process


def check_resumed(stream: Stream, prompt: str) -> None:
    """The answer is whole, as arithmetic has it, and billed as if nothing had happened."""
    tokens = stream.read_all()
    check_tokens(prompt, tokens, NUM_TOKENS)
    assert stream.finish_reason == "length"
    usage = stream.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), NUM_TOKENS)
    assert usage.prompt_tokens_details.cached_tokens == 0


def check_tokens(prompt: str, tokens: list[int], num_tokens: int) -> None:
    breaks = breaks_in(prompt, tokens)
    assert tokens == expected(prompt, num_tokens, breaks)
    assert len(breaks) <= 1
    assert all(place >= NUM_READ for place in breaks)


# ── decode ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decode_worker_frozen_in_mid_stream(cluster, client):
    prompt, num_before = "It freezes; the stream goes on elsewhere", num_retries(cluster)
    stream, name = begin(cluster, client, prompt, ENDLESS)
    with ThreadPoolExecutor(1) as pool:
        goes_on = threading.Event()
        so_far = pool.submit(stream.read_beyond, goes_on)
        cluster.signal(name, signal.SIGSTOP)
        eventually(lambda: num_retries(cluster) == num_before + 1, SOON_S)
        goes_on.set()
        tokens = so_far.result()
    check_tokens(prompt, tokens, len(tokens))
    stream.leave()
    cluster.signal(name, signal.SIGCONT)
    # It finds its connection gone, frees everything, and reports again.
    eventually(lambda: cluster.metrics(name)["packlight_decode_pages{state=held}"] == 0)
    eventually(lambda: health_of(cluster.url)["details"]["workers"] == {"prefill": 2, "decode": 2})


# ── redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_redis_dies_and_comes_back(cluster, client, request):
    prompts = [f"{number:02} {'is the beginning of a prompt that is worth caching':>800}" for number in range(16)]
    for prompt in prompts:
        assert ask(client, prompt)[0] == expected(prompt, 8)
    cluster.kill("redis")

    def says_away() -> bool:
        tokens, _ = ask(client, "Nobody notices anything of it")
        assert tokens == expected("Nobody notices anything of it", 8)
        health = health_of(cluster.url)
        assert health["ready"]
        details = health["details"]
        return details["prefix_index"].startswith("away") and details["fleet_registry"].startswith("away")

    eventually(says_away)
    time.sleep(6.0)  # longer than a silent worker is believed to live: nobody can report, so nobody is given up
    assert says_away()
    request.getfixturevalue("new_redis")
    healed = {
        "workers": {"prefill": 2, "decode": 2},
        "prefix_index": "available",
        "fleet_registry": "available",
    }

    def heals() -> bool:
        ask(client, "Nobody notices anything of it")
        return health_of(cluster.url)["details"] == healed

    eventually(heals)
    for prompt in prompts:
        eventually(lambda p=prompt: 50 in held_pages(cluster, p).values(), what="prefill workers say what they hold")
    num_hits = 0
    for prompt in prompts:
        tokens, usage = ask(client, prompt)
        assert tokens == expected(prompt, 8)
        num_hits += usage.prompt_tokens_details.cached_tokens == 800
    # A router that knows nothing finds half of them. One that knows goes elsewhere where that looks quicker, or where
    # Redis was slow to answer.
    assert num_hits > 12


def held_pages(cluster: RunningCluster, prompt: str) -> dict[str, int]:
    """What the index in Redis says of a prompt: by worker, how many of its pages are held."""

    async def match() -> dict[str, int]:
        config = IndexConfig(backend="redis", redis_url=cluster.redis_url, timeout_s=2.0)
        index = build_index(config, {}, time.monotonic)
        fingerprint = fake_spec().fingerprint
        try:
            return await index.match(fingerprint, page_hashes(list(prompt.encode()), 16, fingerprint=fingerprint))
        finally:
            await index.close()

    return asyncio.run(match())


# ── death ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decode_worker_killed_in_mid_stream(cluster, client):
    prompt, num_before = "It dies; the stream goes on elsewhere", num_retries(cluster)
    stream, name = begin(cluster, client, prompt, NUM_TOKENS)
    cluster.kill(name)
    check_resumed(stream, prompt)
    assert num_retries(cluster) == num_before + 1
    for number in range(5):
        assert ask(client, f"{number} are served by the other one")[0]
    eventually(lambda: health_of(cluster.url)["details"]["workers"] == {"prefill": 2, "decode": 1})


def test_a_prefill_worker_killed_while_requests_come(cluster, client):
    stop, failures, num_answers = threading.Event(), [], 0

    def keep_asking() -> None:
        nonlocal num_answers
        while not stop.is_set():
            prompt = f"{num_answers} of many short questions"
            try:
                tokens, _ = ask(client, prompt, 30)
            except openai.APIError as error:
                failures.append(error)
            else:
                # Only the prefill worker dies: at most its first token may have come before its pages.
                assert tokens in (expected(prompt, 30), expected(prompt, 30, (1,)))
            num_answers += 1

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        eventually(lambda: num_answers > 20)
        cluster.kill("prefill-0")
        killed_at = num_answers
        eventually(lambda: num_answers > killed_at + 30)
        eventually(lambda: health_of(cluster.url)["details"]["workers"]["prefill"] == 1)
    finally:
        stop.set()
        asking.join()
    assert failures == []


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ending_the_cluster_lets_running_requests_finish(cluster, client):
    """The last test with this cluster."""
    prompt = "I was here before you closed"
    stream = Stream(client, prompt, NUM_TOKENS)
    stream.read(10)
    cluster.process.popen.send_signal(signal.SIGTERM)
    eventually(lambda: is_draining_or_gone(cluster))
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        ask(client, "And I came late")
    assert stream.read_all() == expected(prompt, NUM_TOKENS)
    assert stream.finish_reason == "length"
    assert cluster.process.popen.wait(30) == 0
    assert not any(is_alive(pid) for pid in cluster.pids)
    assert "Traceback" not in cluster.process.output


def is_draining_or_gone(cluster: RunningCluster) -> bool:
    """Gone: the whole answer waits in the socket for a test that was slow to ask."""
    try:
        return bool(health_of(cluster.url)["draining"])
    except httpx.TransportError:
        return True
