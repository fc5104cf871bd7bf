"""Selection as on a GPU, on a CPU: nothing waits inside a layer, and what was not read there is read before the answer.

FlashInfer's stand-in attends and tells its log-sum-exp, and the worker is told that its pool is elsewhere.
"""

import asyncio

import pytest
import torch
from prometheus_client import CollectorRegistry

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.compress.select import Selector
from packlight.compress.window import WindowAttention, attention_given
from packlight.core.config import PrefillConfig
from packlight.core.errors import InternalError
from packlight.core.shipping import Chunk, FirstToken, LayerHeader, Shipped
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.prefill import dispatch
from packlight.prefill.shipper import Shipper
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from tests.support.fake_flashinfer import fake_kernels
from tests.support.fake_pair import running, until
from tests.support.tape import NoWaiting
from tests.support.tiny_models import sharp_llama

PROMPT = tuple(5 + (11 * i * i + i) % 240 for i in range(90))
SNAPKV = PackSpec("snapkv", budget_tokens=40, window=8, kernel=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sharp_llama(tmp_path_factory.mktemp("sharp"), 2)


@pytest.fixture
def late(monkeypatch):
    """Selections are read late, and no layer waits."""
    select_layer = Shipper.__call__

    def guarded(self, layer, queries):
        with NoWaiting():
            select_layer(self, layer, queries)

    def begin():
        monkeypatch.setattr(dispatch, "Selector", lambda *args, **how: Selector(*args, **{**how, "reads_late": True}))
        monkeypatch.setattr(Shipper, "__call__", guarded)

    return begin


class CopiedWindow:
    """The window's attention in torch, which needs the log-sum-exp. It is NaN in layer 1 of prompts of `spoiled`."""

    def __init__(self, pool, spoiled=0):
        self.pool, self.spoiled = pool, spoiled

    def attend(self, layer, q_WHD, blocks, num_tokens, scale, lse_WH=None):
        assert lse_WH is not None
        found = attention_given(q_WHD, self.pool.read_keys(layer, blocks, num_tokens), scale, lse_WH)
        if (layer, num_tokens) != (1, self.spoiled):
            return found
        return WindowAttention(torch.full_like(found.mass_KS, torch.nan), found.lse_WH)


async def prefill(model, *requests, spoiled=0):
    """The events of each of the requests, which share steps, or what it failed with."""
    compute = Compute()
    pool = KVPool(model.spec, num_blocks=64, page_size=16, dtype=torch.float32)
    runner = Runner(model, pool, FlashInferAttention("cpu", fake_kernels()))
    runner.window = CopiedWindow(pool, spoiled)
    worker = PrefillWorker(PrefillConfig(), runner, compute, metrics=PrefillMetrics(CollectorRegistry()))
    reading = [asyncio.create_task(read(worker.prefill(request))) for request in requests]
    await asyncio.sleep(0)  # all are in the queue before the first step
    async with running(worker.run()):
        events = await asyncio.gather(*reading)
        await until(lambda: worker.num_unfinished == 0 and worker.blocks.book.num_held == 0)
    worker.check()
    compute.close()
    return events


async def read(stream):
    events = []
    try:
        async for event in stream:
            events.append(event)
    except InternalError as error:
        events.append(error)
    return events


def ask(pack, prompt=PROMPT):
    return PrefillRequest(f"r{len(prompt)}", prompt, len(prompt), SamplingParams(temperature=0.0), pack)


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("recipe", ["snapkv", "rocketkv", "pyramidkv"])
async def test_the_same_shipment_without_waiting(model, late, recipe):
    request = ask(PackSpec(recipe, budget_tokens=40, window=8))
    [early] = await prefill(model, request)
    late()
    [got] = await prefill(model, request)
    for kind in (LayerHeader, Chunk, FirstToken):
        assert of(kind, got) == of(kind, early)
    assert len(of(LayerHeader, got)) == model.spec.num_layers
    assert len(of(Chunk, got)) >= model.spec.num_layers
    [shipped], [expected] = of(Shipped, got), of(Shipped, early)
    assert shipped.retained_mass == pytest.approx(expected.retained_mass, abs=1e-9)
    assert shipped.num_kept_tokens == expected.num_kept_tokens


async def test_a_layer_that_means_nothing_fails_its_request_before_the_answer_and_no_other(model, late):
    late()
    bad, good = await prefill(model, ask(SNAPKV), ask(SNAPKV, PROMPT[:70]), spoiled=len(PROMPT))
    assert isinstance(bad[-1], InternalError)
    assert bad[-1].message == "the attention of layer 1 is not finite, so no token can be preferred"
    assert not of(FirstToken, bad)
    assert not of(Shipped, bad)
    assert len(of(FirstToken, good)) == len(of(Shipped, good)) == 1


async def test_the_guard_notices_who_waits(model, late):
    """CAKE's layers are weighed on the host."""
    late()
    [events] = await prefill(model, ask(PackSpec("cake", budget_tokens=40, window=8)))
    assert isinstance(events[-1], InternalError)
    assert "waits for the device" in events[-1].message
