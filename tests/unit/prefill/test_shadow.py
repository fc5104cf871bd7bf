"""Shadow fidelity: what the prefill worker says packing costs is what it costs."""

import math

import pytest
import torch
from prometheus_client import CollectorRegistry

from packlight.attention.sdpa import SdpaAttention
from packlight.core.config import PrefillConfig
from packlight.core.shipping import FirstToken
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.prefill.shadow import Shadows, divergence
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from tests.support.fake_pair import running, until
from tests.support.real_pair import MaskedAttention
from tests.support.tiny_models import sharp_llama

PROMPT = tuple(5 + (11 * i * i + i) % 240 for i in range(96))  # whole pages: the next token needs a new block
SNAPKV = PackSpec("snapkv", budget_tokens=40, window=8, kernel=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sharp_llama(tmp_path_factory.mktemp("sharp"), 2)


class OnePrefill:
    """A prefill worker that answers single requests, and its metrics."""

    def __init__(self, model, *, ratio, num_blocks=32):
        self.registry, self.compute = CollectorRegistry(), Compute()
        pool = KVPool(model.spec, num_blocks=num_blocks, page_size=16, dtype=torch.float32)
        config = PrefillConfig(shadow_ratio=ratio)
        runner = Runner(model, pool, SdpaAttention())
        self.worker = PrefillWorker(config, runner, self.compute, metrics=PrefillMetrics(self.registry))

    async def run(self, prompt, pack):
        """The first token, when everything is over."""
        request = PrefillRequest("r", tuple(prompt), len(prompt), SamplingParams(temperature=0.0), pack)
        async with running(self.worker.run()):
            events = [event async for event in self.worker.prefill(request)]
            await until(lambda: self.worker.num_unfinished == 0 and self.worker.blocks.book.num_held == 0)
        self.worker.check()
        self.compute.close()
        return next(event.token.token_id for event in events if isinstance(event, FirstToken))

    def value(self, name, **labels):
        return self.registry.get_sample_value(f"packlight_prefill_shadow_{name}", labels)


def logits_after(model, prompt, token, pack):
    """Of `token` behind a packed prompt, by dense masked attention over everything."""
    ids = torch.tensor([*prompt, token])
    with torch.inference_mode():
        return model.forward(
            ids, torch.arange(len(ids)), MaskedAttention(len(prompt), pack), torch.tensor([len(prompt)])
        )[0]


@pytest.mark.parametrize("num_tokens", [96, 91])
async def test_the_divergence_is_that_of_masked_dense_attention(model, num_tokens):
    prompt, one = PROMPT[:num_tokens], OnePrefill(model, ratio=1.0)
    token = await one.run(prompt, SNAPKV)
    exact, packed = (logits_after(model, prompt, token, pack).double() for pack in (PackSpec(), SNAPKV))
    p, q = exact.softmax(0), packed.softmax(0)
    expected = float((p * (p.log() - q.log())).sum())
    assert expected > 1e-3
    assert one.value("kl_nats_sum", recipe="snapkv") == pytest.approx(expected, rel=1e-3)
    assert one.value("kl_nats_count", recipe="snapkv") == 1
    same = "yes" if exact.argmax() == packed.argmax() else "no"
    assert one.value("tokens_total", recipe="snapkv", same=same) == 1


@pytest.mark.parametrize("recipe", ["quest", "rocketkv", "cake", "h2o"])
async def test_every_kind_of_recipe_has_a_shadow(model, recipe):
    one = OnePrefill(model, ratio=1.0)
    await one.run(PROMPT, PackSpec(recipe, budget_tokens=40, window=8))
    assert one.value("kl_nats_count", recipe=recipe) == 1
    assert math.isfinite(one.value("kl_nats_sum", recipe=recipe))


@pytest.mark.parametrize("pack", [PackSpec(), PackSpec("snapkv", budget_tokens=96)], ids=["none", "whole"])
async def test_nothing_is_compared_when_nothing_is_dropped(model, pack):
    one = OnePrefill(model, ratio=1.0)
    await one.run(PROMPT, pack)
    assert one.value("kl_nats_count", recipe=pack.recipe) is None


async def test_a_codec_alone_is_worth_a_comparison(model):
    one = OnePrefill(model, ratio=1.0)
    await one.run(PROMPT, PackSpec(codec="int4"))
    assert 0 < one.value("kl_nats_sum", recipe="none") < 1


async def test_without_a_free_block_the_answer_comes_and_nothing_is_compared(model):
    one = OnePrefill(model, ratio=1.0, num_blocks=len(PROMPT) // 16)
    await one.run(PROMPT, SNAPKV)
    assert one.value("kl_nats_count", recipe="snapkv") is None


def test_the_sample_has_the_size_that_was_asked_for(model):
    def chosen(ratio):
        shadows = Shadows(ratio, None, None, None, None)  # type: ignore[arg-type]  # deciding needs none of them
        requests = (PrefillRequest(f"r{i}", PROMPT, len(PROMPT), SamplingParams(), SNAPKV) for i in range(2000))
        return {request.request_id for request in requests if shadows.wants(request)}

    assert chosen(0.0) == set()
    assert len(chosen(1.0)) == 2000
    assert 150 < len(chosen(0.1)) < 250
    assert chosen(0.1) < chosen(0.3)


def test_divergence_of_equal_and_of_certain_distributions():
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert divergence(logits, logits).kl_nats == 0.0
    assert divergence(logits, logits + 5).is_same_token
    worse = divergence(torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0]))
    assert not worse.is_same_token
    assert worse.kl_nats == pytest.approx(9.0, rel=1e-2)
