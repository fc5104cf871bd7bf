"""Real processes: a rank that dies ends its worker, and ranks end with it. What cannot be divided is told at start."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from packlight.core.config import DecodeConfig
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError, InternalError, WorkerLost
from packlight.core.workers import Role
from packlight.embedded import Embedded
from packlight.engine.engine import open_engine
from packlight.engine.parallel.followers import Followers
from packlight.engine.parallel.messages import Kind, Message
from packlight.engine.runner import ChunkWork
from packlight.models.opened import open_model
from tests.e2e.helpers import client_of
from tests.support.cluster import PATIENCE_S, eventually, is_alive, packlight, running_cluster, running_process
from tests.support.tiny_models import eager_model, write_model_folder

pytestmark = pytest.mark.e2e

WORK = ChunkWork(list(range(3, 19)), 0, np.arange(1, dtype=np.int32), wants_logits=True)
SMALL = ("model.dtype=float32", "prefill.attention=sdpa", "decode.attention=sdpa",
         "prefill.kv_memory_bytes=8388608", "decode.kv_memory_bytes=8388608")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "llama", eager_model("llama")).path


def opened_engine(role, *settings):
    config = build_config({}, [*SMALL, *settings])
    return open_engine(open_model(config.model, on_progress=print), config, role, on_progress=print), config


async def test_without_a_rank_there_is_no_worker(folder):
    engine, config = opened_engine(Role.PREFILL, f"model.path={folder}", "prefill.tensor_parallel=2")
    try:
        runner = engine.prefill_runner(config.prefill)
        runner.prefill([WORK])
        os.kill(engine._crew.followers.pids[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(InternalError, match="rank 1 of this worker is gone"):
                await engine.watch()
        for reason in ("a rank of this worker failed: ", "a rank of this worker failed before: "):
            with pytest.raises(WorkerLost, match=reason):
                runner.prefill([WORK])
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("decode.tensor_parallel=3",), r"decode.tensor_parallel=3: llama has 2 KV heads"),
        (("decode.tensor_parallel=2", "model.path=fake"), "the fake model has nothing to divide"),
        (("decode.tensor_parallel=2", "model.weights=int4"), r"model.weights=int4 is for one process"),
        (("decode.tensor_parallel=2", "decode.kv_codec=int8"), r"decode.kv_codec=int8 is for one process"),
    ],
)
def test_what_cannot_be_divided_is_told_before_anything_starts(folder, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        opened_engine(Role.DECODE, f"model.path={folder}", *settings)


def test_one_process_stays_one():
    config = build_config({}, ["model.path=fake", "prefill.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"prefill.tensor_parallel=2: `packlight serve` is one process"):
        Embedded(config, open_model(config.model, on_progress=print), print)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_followers_end_with_the_first_process(folder, number):
    settings = (f"model.path={folder}", *SMALL, "prefill.tensor_parallel=2", "prefill.drain_s=1")
    with running_process(packlight("prefill", *settings)) as process:
        process.wait_for(r"is ready on")
        (follower,) = children(process.popen.pid)
        process.popen.send_signal(number)
        assert process.popen.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        eventually(lambda: not is_alive(follower))


@needs_proc
def test_a_decode_process_of_two_ranks_serves_and_ends_with_its_follower(folder):
    settings = (f"model.path={folder}", *SMALL, "decode.tensor_parallel=2")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with running_cluster("--prefill", "0", "--decode", "1", *flags) as cluster:
        with client_of(cluster.url) as client:
            request = {"model": "llama", "prompt": "in the morning", "max_tokens": 12, "temperature": 0}
            said = client.completions.create(**request, extra_body={"kv": {"recipe": "none"}, "ignore_eos": True})
        assert said.usage.completion_tokens == 12
        (follower,) = children(cluster.pid("decode-0"))
        os.kill(follower, signal.SIGKILL)
        cluster.process.wait_for(r"decode-0 ended unasked, with exit code [1-9]", PATIENCE_S)
        eventually(lambda: not is_alive(follower))


TIMEOUT_S = 5.0


def events_of(response):
    """What a stream says, but for its end mark."""
    lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
    return (json.loads(line) for line in lines if line != "[DONE]")


def is_terminal(event):
    return "error" in event or any(choice["finish_reason"] for choice in event["choices"])


@needs_proc
def test_a_frozen_rank_ends_its_worker_and_the_request_gets_one_error(folder):
    settings = (f"model.path={folder}", *SMALL, "decode.tensor_parallel=2", f"decode.rank_timeout_s={TIMEOUT_S}")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    body = {"model": "llama", "prompt": "in the morning", "max_tokens": 220, "stream": True, "ignore_eos": True}
    with (
        running_cluster("--prefill", "0", "--decode", "1", *flags) as cluster,
        httpx.Client(trust_env=False, timeout=60.0) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=body) as response,
    ):
        (follower,) = children(cluster.pid("decode-0"))
        events = events_of(response)
        told = [next(events) for _ in range(4)]
        frozen_at = time.monotonic()
        os.kill(follower, signal.SIGSTOP)
        told += events
        waited_s = time.monotonic() - frozen_at
        assert [is_terminal(event) for event in told] == [False] * (len(told) - 1) + [True]
        assert told[-1]["error"]["type"] == "server_error"
        assert waited_s > TIMEOUT_S / 2, "it was not waited for"
        assert waited_s < DecodeConfig().rank_timeout_s / 2, "it was waited for as by default"
        cluster.process.wait_for(r"a rank of this worker failed, and the others with it: .*[Tt]imed? ?out", PATIENCE_S)
        cluster.process.wait_for(r"decode-0 ended unasked, with exit code [1-9]", PATIENCE_S)
        eventually(lambda: not is_alive(follower))


def test_a_rank_that_does_not_read_is_given_up():
    """Before a step begins there is nobody to notice but who writes."""
    followers = Followers(2, timeout_s=0.5)
    try:
        os.kill(followers.pids[0], signal.SIGSTOP)
        message = Message(Kind.STORE, arrays=[np.arange(1 << 17)])  # more than a pipe holds
        with pytest.raises(WorkerLost, match=r"rank 1 of this worker took nothing for 0.5 s \(rank_timeout_s\)"):
            followers.tell(1, message)
    finally:
        followers.kill()
        followers.close()
