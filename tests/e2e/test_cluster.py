"""Real processes, over HTTP, while all is well - and how the cluster itself ends."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import openai
import pytest

from tests.e2e.helpers import Stream, ask, client_of, expected, health_of
from tests.support.cluster import (
    CLUSTER,
    SMALL_POOLS,
    RunningCluster,
    eventually,
    is_alive,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

SETTINGS = ("model.path=fake", *SMALL_POOLS, "decode.max_batch=4", "decode.max_queue=4", "index.timeout_s=0.25")
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


def running_requests(cluster: RunningCluster) -> float:
    return sum(cluster.metrics(name)["packlight_decode_running_requests"] for name in DECODES)


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
    assert health_of(cluster.url)["details"] == {
        "workers": {"prefill": 2, "decode": 2},
        "prefix_index": "available",
        "fleet_registry": "available",
    }


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
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json={**good, **body}, trust_env=False)
    assert reply.status_code == status
    assert code is None or reply.json()["error"]["code"] == code
    assert num_prompts(cluster) == before


# ── placement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_workers_are_used(cluster, client):
    before, numbers = num_prompts(cluster), count()

    def all_were_asked() -> bool:
        """Where requests come too slowly to overlap, one prefill worker can do with them what two would."""
        prompts = [f"{next(numbers)} is how this prompt begins, and no other" for _ in range(16)]
        with ThreadPoolExecutor(8) as pool:
            for prompt, (tokens, _) in zip(prompts, pool.map(lambda p: ask(client, p, 20), prompts), strict=True):
                assert tokens == expected(prompt, 20)
        return all(now > then for now, then in zip(num_prompts(cluster), before, strict=True))

    eventually(all_were_asked)
    steps = [cluster.metrics(name)["packlight_decode_step_seconds_count"] for name in DECODES]
    assert min(steps) > 0


def test_a_shared_prefix_draws_its_requests_to_one_worker(cluster, client):
    prefix = "A long system prompt that every request of this tenant begins with. " * 8
    ask(client, f"{prefix}0", 2)
    eventually(lambda: ask(client, f"{prefix}again", 2)[1].prompt_tokens_details.cached_tokens >= 512)
    before = num_prompts(cluster)
    for number in range(10):
        _, usage = ask(client, f"{prefix}{number}", 2)
        assert usage.prompt_tokens_details.cached_tokens == len(prefix) // 16 * 16
    added = [now - then for now, then in zip(num_prompts(cluster), before, strict=True)]
    assert sorted(added) == [0, 10]


# ── overload, and clients that leave ─────────────────────────────────────────────────────────────────────────────────


def test_a_full_fleet_refuses_and_says_when_to_come_back(cluster, client):
    """8 run, 8 wait, the rest is refused; those that were let in get their whole answer."""

    def try_one(number: int):
        try:
            return ask(client, f"{number} is one too many", 300)[0]
        except openai.RateLimitError as refused:
            return refused

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(try_one, range(32)))
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert 1 <= len(refused) <= 16
    for error in refused:
        assert error.code == "rate_limit_exceeded"
        assert int(error.response.headers["retry-after"]) >= 1
    for number, tokens in enumerate(results):
        assert isinstance(tokens, openai.RateLimitError) or tokens == expected(f"{number} is one too many", 300)
    eventually(lambda: held_pages(cluster) == 0)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(cluster, is_stream):
    with client_of(cluster.url) as client:
        if is_stream:
            stream = Stream(client, "I shall not stay", 3000)
            stream.read(10)
            assert held_pages(cluster) > 0
            stream.leave()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).chat.completions.create(
                    model="fake",
                    messages=[{"role": "user", "content": "Nor shall I"}],
                    max_tokens=3000,
                    extra_body={"min_tokens": 3000},
                )
    eventually(lambda: running_requests(cluster) == 0 and held_pages(cluster) == 0, timeout_s=2.0)


# ── the cluster's own end ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_dies_unasked_ends_the_cluster(cluster):
    """The last test with this cluster."""
    pids = cluster.pids
    assert len(pids) == 6
    assert all(is_alive(pid) for pid in pids)
    os.kill(cluster.pid("decode-1"), signal.SIGKILL)
    assert cluster.process.popen.wait(30) == 1
    assert "decode-1 ended unasked, with exit code -9" in cluster.process.output
    assert not any(is_alive(pid) for pid in pids)


def test_a_cluster_that_is_killed_takes_its_processes_with_it():
    with running_process([sys.executable, str(CLUSTER), "--port", "0", "--set", "model.path=fake"]) as process:
        process.wait_for(r"(?m)^router +\| pid")
        pids = RunningCluster(process, 0).pids
        assert all(is_alive(pid) for pid in pids)
        process.popen.kill()
        eventually(lambda: not any(is_alive(pid) for pid in pids), timeout_s=5.0)


def test_a_cluster_whose_workers_cannot_start_says_why():
    with running_process(
        [sys.executable, str(CLUSTER), "--prefill", "0", "--decode", "1", "--set", "model.path=/no/such/model"]
    ) as process:
        assert process.popen.wait(60) == 1
        assert "model.path '/no/such/model': no such folder or file" in process.output
        assert "ended unasked, with exit code 2" in process.output


def test_a_machine_without_redis_is_told_what_to_install():
    """`-S`: without the packages that were installed, of which one carries a Valkey."""
    with running_process([sys.executable, "-S", str(CLUSTER)], {"PATH": "/nowhere", "PYTHONPATH": ""}) as process:
        assert process.popen.wait(30) == 2
        assert "apt-get install" in process.output
