"""A decode worker whose steps are captured answers as one whose steps are not."""

import asyncio

import pytest
import torch
from prometheus_client import CollectorRegistry

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.sdpa import SdpaAttention
from packlight.core.config import DecodeConfig, DType, GraphsConfig, ModelConfig, PrefillConfig
from packlight.core.types import PackSpec, Tokens
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.graphs import GraphedRunner
from packlight.engine.runner import DecodeRunner, Runner
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool
from packlight.models.adapter import load_transformers_model
from packlight.models.opened import open_model
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from tests.support.fake_flashinfer import fake_kernels
from tests.support.fake_pair import running, until
from tests.support.real_pair import greedy
from tests.support.tape import TapeEngine
from tests.support.tiny_models import eager_model, write_model_folder

PAGE = 4
GRAPHS = GraphsConfig(batch_sizes=[1, 4], tokens=[128], recipes=["rocketkv", "none"], read_tokens=32)
PROMPT = [(11 * index) % 280 + 3 for index in range(100)]
PACKS = {
    "r1": PackSpec(),
    "r2": PackSpec("snapkv", 30),
    "r3": PackSpec("rocketkv", 60),
    "r4": PackSpec("rocketkv", 40),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("llama"), eager_model("llama"))
    opened = open_model(ModelConfig(path=str(folder.path), dtype=DType.FLOAT32), on_progress=print)
    return load_transformers_model(folder, opened.spec, device="cpu", on_progress=print)


def make_runner(model, pool, *, graphs):
    if graphs:
        return GraphedRunner(model, pool, FlashInferAttention("cpu", fake_kernels()), TapeEngine(), sizes=GRAPHS)
    return DecodeRunner(model, pool, SdpaAttention())


async def answers(model, pool_class, packs, *, graphs):
    """The tokens of each request, all at once; and the metrics of the decode worker."""
    compute, registry, config = Compute(), CollectorRegistry(), DecodeConfig(graphs=GRAPHS)
    exact = KVPool(model.spec, num_blocks=200, page_size=PAGE, dtype=torch.float32)
    pool = pool_class(model.spec, num_blocks=400, page_size=PAGE, dtype=torch.float32)
    prefill = PrefillWorker(
        PrefillConfig(), Runner(model, exact, SdpaAttention()), compute, metrics=PrefillMetrics(CollectorRegistry())
    )
    runner = make_runner(model, pool, graphs=graphs)
    decode = DecodeWorker(config, runner, compute, lambda *_: prefill, metrics=DecodeMetrics(registry))
    decode.prepare(print)

    async def answer(name, pack):
        request = greedy(PROMPT, 16, pack=pack, request_id=name)
        events = [event async for event in decode.generate(request)]
        return [token.token_id for event in events if isinstance(event, Tokens) for token in event.tokens]

    try:
        async with running(prefill.run(), decode.run()):
            tokens = await asyncio.gather(*(answer(*item) for item in packs.items()))
            await until(lambda: prefill.num_unfinished == 0 and decode.num_unfinished == 0)
        decode.check()
    finally:
        compute.close()
    modes = {
        sample.labels["mode"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "packlight_decode_graph_steps_total"
    }
    return tokens, modes


@pytest.mark.parametrize(("name", "pool_class"), [*((name, KVPool) for name in PACKS), ("r3", FP8Pool)])
async def test_the_same_answer_as_without_graphs(model, pool_class, name):
    pack = {name: PACKS[name]}
    (graphed, modes), (plain, _) = [await answers(model, pool_class, pack, graphs=graphs) for graphs in (True, False)]
    assert graphed == plain
    assert len(plain[0]) == 16
    assert modes == {"replayed": 15}


async def test_requests_of_every_kind_at_once(model):
    """They come and go, so steps differ; those that are read by one rule are replayed."""
    (graphed, modes), (plain, _) = [await answers(model, KVPool, PACKS, graphs=graphs) for graphs in (True, False)]
    assert graphed == plain
    assert modes["replayed"] > 0
