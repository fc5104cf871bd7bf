"""Real processes, over HTTP, while all is well - and how the cluster itself ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from itertools import count

import openai
import pytest

from tests.e2e.helpers import ENDLESS, LONG_CONTEXT, Stream, ask, chat, client_of, expected, health_of
from tests.support.cluster import (
    CLUSTER,
    PATIENCE_S,
    PATIENT,
    SMALL_POOLS,
    START_TIMEOUT_S,
    RunningCluster,
    eventually,
    is_alive,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

SETTINGS = ("model.path=fake", *SMALL_POOLS, *PATIENT, LONG_CONTEXT, "decode.max_batch=4", "decode.max_queue=4")
FLAGS = [flag for setting in SETTINGS for flag in ("--set", setting)]
PREFILLS, DECODES = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(*FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with client_of(cluster.url) as client:
        yield client


def num_prompts(cluster: RunningCluster) -> list[float]:
    return [cluster.metrics(name).get("packlight_prefill_requests_total{outcome=completed}", 0) for name in PREFILLS]


def held_pages(cluster: RunningCluster) -> float:
    return sum(cluster.metrics(name)["packlight_decode_pages{state=held}"] for name in DECODES)


def num_requests(cluster: RunningCluster, state: str) -> float:
    """`running` or `queued`."""
    return sum(cluster.metrics(name)[f"packlight_decode_{state}_requests"] for name in DECODES)


def num_cancelled(cluster: RunningCluster) -> float:
    return sum(cluster.metrics(name).get("packlight_decode_requests_total{outcome=cancelled}", 0) for name in DECODES)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_at_once(client):
    tokens, usage = ask(client, "What is the sum of these bytes?", 40)
    assert tokens == expected("What is the sum of these bytes?", 40)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (31, 40, 71)
    assert usage.model_extra["kv"]["shipped_bytes"] == 32 * 16


def test_an_answer_as_a_stream(client):
    stream = Stream(client, "Stream, please", 200)
    assert stream.read_all() == expected("Stream, please", 200)
    assert stream.finish_reason == "length"
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (14, 200)


def test_text_and_the_end_of_text(client):
    """Without a minimum the arithmetic soon meets token 0, which ends the text."""
    request = {"model": "fake", "messages": [{"role": "user", "content": "!"}], "temperature": 0}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.encode()[:2] == bytes([(33 + 1) % 256, (33 + 34 + 2) % 256])
    stream = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


def test_several_choices_of_one_prompt(client):
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Thrice"}], n=3, temperature=0, max_tokens=5
    )
    assert len({choice.message.content for choice in answer.choices}) == 1
    assert answer.usage.completion_tokens == 15


def test_the_models_and_the_state_of_the_fleet(cluster, client):
    assert [model.id for model in client.models.list()] == ["fake"]
    all_is_well = {
        "workers": {"prefill": 2, "decode": 2},
        "prefix_index": "available",
        "fleet_registry": "available",
    }
    eventually(lambda: health_of(cluster.url)["details"] == all_is_well)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
        ({"temperature": 3}, 400, None),
    ],
)
def test_bad_requests_are_refused_before_any_worker_hears_of_them(cluster, body, status, code):
    before = num_prompts(cluster)
    good = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    reply = chat(cluster.url, {**good, **body})
    assert reply.status_code == status
    assert code is None or reply.json()["error"]["code"] == code
    assert num_prompts(cluster) == before


# ── placement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_workers_are_used(cluster, client):
    before, numbers = num_prompts(cluster), count()

    def all_were_asked() -> bool:
        """Where requests come too slowly to overlap, one prefill worker can do with them what two would; and one that a
        pause made look slow is asked again only when that is long enough ago."""
        prompts = [f"{next(numbers)} is how this prompt begins, and no other" for _ in range(16)]
        with ThreadPoolExecutor(8) as pool:
            for prompt, (tokens, _) in zip(prompts, pool.map(lambda p: ask(client, p, 20), prompts), strict=True):
                assert tokens == expected(prompt, 20)
        steps = [cluster.metrics(name)["packlight_decode_step_seconds_count"] for name in DECODES]
        return min(steps) > 0 and all(now > then for now, then in zip(num_prompts(cluster), before, strict=True))

    eventually(all_were_asked, timeout_s=4 * PATIENCE_S)


def test_a_shared_prefix_draws_its_requests_to_one_worker(cluster, client):
    """Unless the other worker looks so much faster that computing it anew is quicker, as on a busy machine it may for
    a moment. Then both hold the prefix, so it is tried again with another one: by chance alone one of these tries would
    look right once in 170 times."""
    tries = 3
    for number in range(tries):
        prefix = f"{number} is a long system prompt that every request of this tenant begins with. " * 8
        ask(client, f"{prefix}0", 2)
        eventually(lambda p=prefix: ask(client, f"{p}again", 2)[1].prompt_tokens_details.cached_tokens >= 512)
        before = num_prompts(cluster)
        usages = [ask(client, f"{prefix}{number}", 2)[1] for number in range(10)]
        added = [now - then for now, then in zip(num_prompts(cluster), before, strict=True)]
        if sorted(added) == [0, 10]:
            break
    assert sorted(added) == [0, 10], f"not once in {tries} tries"
    assert {usage.prompt_tokens_details.cached_tokens for usage in usages} == {len(prefix) // 16 * 16}


# ── overload, and clients that leave ─────────────────────────────────────────────────────────────────────────────────


def test_a_full_fleet_refuses_and_says_when_to_come_back(cluster, client):
    """8 run, 8 wait, the rest is refused; those that were let in get their whole answer."""
    waiting = [f"{number} can wait" for number in range(8)]
    with ThreadPoolExecutor(8) as pool, ExitStack() as leaving:
        for number in range(8):
            stream = Stream(client, f"{number} takes its time", ENDLESS)
            leaving.callback(stream.leave)
            stream.read(1)
        results = [pool.submit(ask, client, prompt) for prompt in waiting]
        eventually(lambda: num_requests(cluster, "queued") == 8)
        for _ in range(4):
            with pytest.raises(openai.RateLimitError) as refused:
                ask(client, "One too many")
            assert refused.value.code == "rate_limit_exceeded"
            assert int(refused.value.response.headers["retry-after"]) >= 1
        assert num_requests(cluster, "running") == 8
        leaving.close()
        assert [result.result()[0] for result in results] == [expected(prompt, 8) for prompt in waiting]
    eventually(lambda: held_pages(cluster) == 0)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(cluster, client, is_stream):
    before = num_cancelled(cluster)
    if is_stream:
        stream = Stream(client, "I shall not stay", ENDLESS)
        stream.read(10)
        leave = stream.leave
    else:
        connection = HTTPConnection("127.0.0.1", cluster.port, timeout=PATIENCE_S)
        question = {"model": "fake", "messages": [{"role": "user", "content": "Nor shall I"}]}
        body = json.dumps({**question, "max_tokens": ENDLESS, "min_tokens": ENDLESS})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        leave = connection.close
    eventually(lambda: num_requests(cluster, "running") == 1 and held_pages(cluster) > 0)
    leave()
    eventually(lambda: num_requests(cluster, "running") == 0 and held_pages(cluster) == 0)
    assert num_cancelled(cluster) == before + 1, "it came to its end"


# ── the cluster's own end ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_dies_unasked_ends_the_cluster(cluster):
    """The last test with this cluster."""
    pids = cluster.pids
    assert len(pids) == 6
    assert all(is_alive(pid) for pid in pids)
    os.kill(cluster.pid("decode-1"), signal.SIGKILL)
    assert cluster.process.popen.wait(START_TIMEOUT_S) == 1
    assert "decode-1 ended unasked, with exit code -9" in cluster.process.output
    assert not any(is_alive(pid) for pid in pids)


def test_a_cluster_that_is_killed_takes_its_processes_with_it():
    with running_process([sys.executable, str(CLUSTER), "--port", "0", "--set", "model.path=fake"]) as process:
        process.wait_for(r"(?m)^router +\| pid")
        pids = RunningCluster(process, 0).pids
        assert all(is_alive(pid) for pid in pids)
        process.popen.kill()
        eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_a_cluster_whose_workers_cannot_start_says_why():
    with running_process(
        [sys.executable, str(CLUSTER), "--prefill", "0", "--decode", "1", "--set", "model.path=/no/such/model"]
    ) as process:
        assert process.popen.wait(START_TIMEOUT_S) == 1
        assert "model.path '/no/such/model': no such folder or file" in process.output
        assert "ended unasked, with exit code 2" in process.output


def test_a_machine_without_redis_is_told_what_to_install():
    """`-S`: without the packages that were installed, of which one carries a Valkey."""
    with running_process([sys.executable, "-S", str(CLUSTER)], {"PATH": "/nowhere", "PYTHONPATH": ""}) as process:
        assert process.popen.wait(PATIENCE_S) == 2
        assert "apt-get install" in process.output
