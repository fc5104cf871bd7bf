"""Real processes: a rank that dies ends its worker, and ranks end with it. What cannot be divided is told at start.

A model is in them only where a test asks it: loading takes seconds, and what becomes of a group does not depend on it.
"""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from packlight.core.config import DecodeConfig
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError, InternalError, WorkerLost
from packlight.core.workers import Role
from packlight.embedded import Embedded
from packlight.engine.engine import open_engine
from packlight.engine.parallel.crew import Crew
from packlight.engine.parallel.followers import Followers
from packlight.engine.parallel.messages import Kind, Message
from packlight.models.opened import open_model
from tests.support.cluster import PATIENCE_S, eventually, is_alive, packlight, running_cluster, running_process
from tests.support.tiny_models import eager_model, write_model_folder

pytestmark = pytest.mark.e2e

SMALL = ("model.dtype=float32", "prefill.attention=sdpa", "decode.attention=sdpa",
         "prefill.kv_memory_bytes=8388608", "decode.kv_memory_bytes=8388608")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "llama", eager_model("llama")).path


async def test_without_a_rank_there_is_no_worker():
    crew = Crew(build_config({}, []), 2, 1)
    try:
        os.kill(crew.followers.pids[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(InternalError, match="rank 1 of this worker is gone"):
                await crew.watch()
        for reason in ("a rank of this worker failed: ", "a rank of this worker failed before: "):
            with pytest.raises(WorkerLost, match=reason), crew.together():
                crew.group.receive((1,), torch.float32, 1)
    finally:
        crew.close()


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
    config = build_config({}, [*SMALL, f"model.path={folder}", *settings])
    with pytest.raises(ConfigError, match=reason):
        open_engine(open_model(config.model, on_progress=print), config, Role.DECODE, on_progress=print)


def test_one_process_stays_one():
    config = build_config({}, ["model.path=fake", "prefill.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"prefill.tensor_parallel=2: `packlight serve` is one process"):
        Embedded(config, open_model(config.model, on_progress=print), print)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")


@needs_proc
def test_a_worker_that_is_told_to_end_takes_its_follower_along(folder):
    settings = (f"model.path={folder}", *SMALL, "prefill.tensor_parallel=2", "prefill.drain_s=1")
    with running_process(packlight("prefill", *settings)) as process:
        process.wait_for(r"is ready on")
        (follower,) = children(process.popen.pid)
        assert process.end() == 0
        eventually(lambda: not is_alive(follower))


FIRST_OF_TWO = """
import signal
from packlight.core.config_tree import build_config
from packlight.engine.parallel.crew import Crew
crew = Crew(build_config({}, []), 2, 1)
print("two have met", flush=True)
signal.pause()
"""


@needs_proc
def test_a_follower_ends_when_the_first_process_is_killed():
    """Nobody closes the pipe or leaves the group."""
    with running_process([sys.executable, "-c", FIRST_OF_TWO]) as process:
        process.wait_for("two have met")
        (follower,) = children(process.popen.pid)
        process.popen.kill()
        eventually(lambda: not is_alive(follower))


TIMEOUT_S = 5.0


def events_of(response):
    """What a stream says, but for its end mark."""
    lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
    return (json.loads(line) for line in lines if line != "[DONE]")


def is_terminal(event):
    return "error" in event or any(choice["finish_reason"] for choice in event["choices"])


@needs_proc
def test_two_ranks_serve_and_a_frozen_one_ends_the_worker_and_the_request_with_one_error(folder):
    settings = (f"model.path={folder}", *SMALL, "decode.tensor_parallel=2", f"decode.rank_timeout_s={TIMEOUT_S}")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    asked = {"model": "llama", "prompt": "in the morning", "temperature": 0, "ignore_eos": True}
    with (
        running_cluster("--prefill", "0", "--decode", "1", *flags) as cluster,
        httpx.Client(base_url=f"{cluster.url}/v1", trust_env=False, timeout=60.0) as client,
    ):
        said = client.post("/completions", json={**asked, "max_tokens": 12, "kv": {"recipe": "none"}}).json()
        assert said["usage"]["completion_tokens"] == 12
        (follower,) = children(cluster.pid("decode-0"))
        with client.stream("POST", "/completions", json={**asked, "max_tokens": 220, "stream": True}) as response:
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
