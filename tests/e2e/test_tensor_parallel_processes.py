"""Real processes: a rank that dies ends its worker, and ranks end with it. What cannot be divided is told at start."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from packlight.core.config import build_config
from packlight.core.errors import ConfigError, InternalError, WorkerLost
from packlight.core.types import Role
from packlight.embedded import Embedded
from packlight.engine.engine import open_engine
from packlight.engine.runner import ChunkWork
from packlight.models.opened import open_model
from tests.e2e.helpers import client_of
from tests.support.cluster import eventually, packlight, running_cluster, running_process
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
        async with asyncio.timeout(10):
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


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_followers_end_with_the_first_process(folder, number):
    settings = (f"model.path={folder}", *SMALL, "prefill.tensor_parallel=2", "prefill.drain_s=1")
    with running_process(packlight("prefill", *settings)) as process:
        process.wait_for(r"is ready on")
        (follower,) = children(process.popen.pid)
        process.popen.send_signal(number)
        assert process.popen.wait(30) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
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
        cluster.process.wait_for(r"decode-0 ended unasked, with exit code [1-9]", timeout_s=30)
        eventually(lambda: not is_alive(follower))
