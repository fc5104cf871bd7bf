"""A prompt that fails does so alone, and leaves nothing behind that another could meet in the cache."""

from __future__ import annotations

import asyncio

import torch

from packlight.core.config import PrefillConfig
from packlight.core.errors import InternalError, QueueFull
from packlight.core.types import Failed, PackSpec
from packlight.models.fake import fake_answer
from packlight.prefill import dispatch
from tests.support.fake_pair import FakePair, answer, collect, fake_pair, make_request, until

PROMPT = list(range(1, 41))
CHUNKS = PrefillConfig(chunk_tokens=16)


class Faulty:
    """A device that computes nonsense in step `number`: what it stores, and what comes of it, is not finite."""

    def __init__(self, pair: FakePair, number: int) -> None:
        runner = pair.prefill._runner
        self._pool, self._prefill, self._left = runner.pool, runner.prefill, number
        runner.prefill = self

    def __call__(self, works, on_layer=None):
        logits = self._prefill(works, on_layer)
        self._left -= 1
        if self._left == 0:
            self._pool.v[works[0].blocks[works[0].start // self._pool.page_size :]] = torch.nan
            logits = logits * torch.nan
        return logits


async def fails(pair: FakePair) -> bool:
    _, event = await collect(pair.decode, make_request(PROMPT, request_id="first"))
    return isinstance(event, Failed) and isinstance(event.error, InternalError)


async def test_a_prefix_that_is_not_finite_fails_nobody_else():
    async with fake_pair(prefill=CHUNKS) as pair:
        Faulty(pair, number=3)  # the last chunk
        assert await fails(pair)
        assert await answer(pair.decode, make_request([*PROMPT, 50])) == fake_answer([*PROMPT, 50], 8)


async def test_nor_does_one_whose_reader_left_before_it_showed():
    async with fake_pair(prefill=CHUNKS) as pair:
        Faulty(pair, number=3)
        pair.prefill_gate.is_open = False
        first = asyncio.create_task(collect(pair.decode, make_request(PROMPT, request_id="first")))
        await until(lambda: pair.prefill.load().num_running == 1)
        pair.prefill_gate.permits.release(2)
        await until(lambda: pair.prefill._roster.admitted[0].num_done == 32)
        first.cancel()
        await until(lambda: pair.prefill._roster.admitted[0].cancelled)
        pair.prefill_gate.let_all()
        assert await answer(pair.decode, make_request([*PROMPT, 50])) == fake_answer([*PROMPT, 50], 8)


async def test_nor_does_one_whose_step_raised_later():
    async with fake_pair(prefill=CHUNKS) as pair:
        Faulty(pair, number=1)
        pair.prefill_gate.is_open = False
        first = asyncio.create_task(fails(pair))
        await until(lambda: pair.prefill.load().num_running == 1)
        pair.prefill_gate.permits.release(2)
        await until(lambda: pair.prefill._roster.admitted[0].num_done == 32)
        pair.prefill_gate.error = ValueError("boom")
        pair.prefill_gate.permits.release()
        assert await first
        pair.prefill_gate.error = None
        pair.prefill_gate.let_all()
        assert await answer(pair.decode, make_request([*PROMPT, 50])) == fake_answer([*PROMPT, 50], 8)


async def test_a_prompt_without_memory_for_its_selection_is_sent_elsewhere(monkeypatch):
    """A device's memory beside the pool is what requests of others leave."""

    def full(*args):
        raise RuntimeError("out of memory")

    async with fake_pair(prefill=CHUNKS) as pair:
        monkeypatch.setattr(dispatch, "AccumulatedMass", full)
        neighbour = asyncio.create_task(answer(pair.decode, make_request(PROMPT, request_id="neighbour")))
        heavy = PackSpec("h2o", budget_tokens=12, window=4, sinks=1)
        _, event = await collect(pair.decode, make_request(PROMPT[::-1], request_id="heavy", pack=heavy))
        assert isinstance(event, Failed)
        assert isinstance(event.error, QueueFull)
        assert event.error.worker_id == "prefill-0"
        assert await neighbour == fake_answer(PROMPT, 8)
