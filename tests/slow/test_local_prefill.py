"""At temperature 0 an answer is the same whoever prefills: the decode worker itself, another one, transformers.

And whatever takes turns with it: prompts that are computed while others decode are cut into other chunks.
"""

import asyncio
import contextlib
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry

from packlight.attention.sdpa import SdpaAttention
from packlight.colocated import PrefillBeside
from packlight.core.config import Config, DecodeConfig, LocalPrefillConfig, PrefillConfig
from packlight.core.types import Tokens
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.engine import LocalEngine
from packlight.engine.runner import DecodeRunner, Runner
from packlight.kv.pool import KVPool
from packlight.prefill.worker import PrefillWorker
from packlight.prefix.memory import MemoryPrefixIndex
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from packlight.wire.prefill import GrpcPrefillClient, prefill_handler
from tests.support.cluster import loopback
from tests.support.fake_pair import answer, running, until
from tests.support.plain_answers import recorded
from tests.support.real_pair import PAGE, greedy

pytestmark = pytest.mark.slow
MAX_TOKENS, POOL_TOKENS = 8, 4096
LOCAL, REMOTE = "decode/prefill", "prefill"


@pytest.fixture(scope="module")
def cases(smollm2):
    """name -> (prompt ids, what transformers generates)."""
    plain = recorded(smollm2.tokenizer)
    names = {"short": "question", "long": "tale"}
    return {name: (plain[known].ids, plain[known].answer[:MAX_TOKENS]) for name, known in names.items()}


@contextlib.asynccontextmanager
async def decode_with_both(model):
    """A decode worker, with its own prefill worker and one behind gRPC; the metrics of its own."""
    memory_bytes = POOL_TOKENS * model.spec.kv_bytes_per_token(4)
    decode_config = DecodeConfig(
        kv_memory_bytes=memory_bytes,
        local_prefill=LocalPrefillConfig(kv_memory_bytes=memory_bytes),
        attention="sdpa",
        max_stall_s=0.05,  # far less than a whole chunk takes
    )
    compute, other = Compute(max_stall_s=decode_config.max_stall_s), Compute("prefill")
    pools = [KVPool(model.spec, num_blocks=POOL_TOKENS // PAGE, page_size=PAGE, dtype=torch.float32) for _ in range(2)]
    registry, config = CollectorRegistry(), Config(decode=decode_config)
    engine = LocalEngine(model, config)
    beside = PrefillBeside(config, ("decode", 1), engine, compute, MemoryPrefixIndex(1000), PrefillMetrics(registry))
    metrics = PrefillMetrics(CollectorRegistry())
    remote = PrefillWorker(PrefillConfig(), Runner(model, pools[0], SdpaAttention()), other, metrics=metrics)
    async with loopback(prefill_handler(remote)) as (_, channel):
        clients = {LOCAL: beside.worker, REMOTE: GrpcPrefillClient(channel, REMOTE)}
        decode = DecodeWorker(
            decode_config,
            DecodeRunner(model, pools[1], SdpaAttention()),
            compute,
            lambda worker_id, address: clients[worker_id],
            metrics=DecodeMetrics(CollectorRegistry()),
        )
        try:
            async with running(beside.run(), remote.run(), decode.run()):
                yield decode, registry
                await until(lambda: not any(one.num_unfinished for one in (decode, beside.worker, remote)))
        finally:
            compute.close()
            other.close()


def request_for(ids, name, prefill_id, num_tokens=MAX_TOKENS):
    stop = {"eos_token_ids": (0, 2), "ignore_eos": False, "min_tokens": num_tokens}
    return replace(greedy(ids, num_tokens, request_id=f"{name}-{prefill_id}", stop=stop), prefill_id=prefill_id)


async def listen(decode, request, into):
    async with contextlib.aclosing(decode.generate(request)) as events:
        async for event in events:
            if isinstance(event, Tokens):
                into += [token.token_id for token in event.tokens]


async def test_local_is_remote_is_plain(smollm2_model, cases):
    async with decode_with_both(smollm2_model) as (decode, registry):
        for name, (ids, expected) in cases.items():
            for prefill_id in (LOCAL, REMOTE):
                assert await answer(decode, request_for(ids, name, prefill_id)) == expected, (name, prefill_id)
        assert registry.get_sample_value("packlight_prefill_requests_total", {"outcome": "completed"}) == len(cases)


async def test_a_prompt_cut_into_small_chunks_by_an_answer_that_runs(smollm2_model, cases):
    (long, long_answer), (short, short_answer) = cases["long"], cases["short"]
    async with decode_with_both(smollm2_model) as (decode, registry):
        said: list[int] = []
        running_on = asyncio.create_task(listen(decode, request_for(short, "a", REMOTE, 200), said))
        await until(lambda: decode.load().step_s > 0, timeout_s=60)
        assert await answer(decode, request_for(long, "b", LOCAL)) == long_answer
        assert not running_on.done()
        running_on.cancel()
        assert said[:MAX_TOKENS] == short_answer
        num_steps = registry.get_sample_value("packlight_prefill_step_tokens_count")
        assert num_steps > 2 * len(long) / PrefillConfig().chunk_tokens
