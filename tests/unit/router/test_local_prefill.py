"""Decode workers that prefill: real workers and the pipeline, with the arithmetic model."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from packlight.core.config import DecodeConfig, RouterConfig
from packlight.core.errors import NoWorker, QueueFull, WorkerLost
from packlight.core.types import Finished, PackSpec, Tokens
from packlight.core.workers import Role
from packlight.models.fake import fake_answer
from tests.support.fake_pair import make_request, until
from tests.support.fleet_of_fakes import FleetOfFakes, broken_answer, events_of, fleet_of_fakes

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SHARED = list(range(1, 33))
LONG = [number % 50 + 1 for number in range(100)]


async def answer(fleet: FleetOfFakes, prompt: list[int], num_tokens: int = 8, **kwargs):
    tokens, end = await events_of(fleet.pipeline.generate(make_request(prompt, num_tokens, **kwargs)))
    assert isinstance(end, Finished), end
    return tokens, end.usage


def placements(fleet: FleetOfFakes, prefill: str, reason: str) -> float:
    labels = {"prefill": prefill, "reason": reason}
    return fleet.registry.get_sample_value("packlight_router_placements_total", labels) or 0.0


def num_local(fleet: FleetOfFakes) -> list[int]:
    """Prompts that each decode worker was asked to prefill itself."""
    return [len(member.local.seen) for member in fleet.members.values() if member.local]


# ── where prompts go ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fleet_without_prefill_workers_serves():
    async with fleet_of_fakes(num_prefill=0, num_decode=1, local_tokens=128) as fleet:
        assert fleet.pipeline.readiness().ready
        tokens, usage = await answer(fleet, PROMPT)
        assert tokens == fake_answer(PROMPT, 8)
        assert (usage.num_prompt_tokens, usage.num_generated_tokens) == (11, 8)
        assert placements(fleet, "local", "only_way") == 1


async def test_a_prompt_that_fits_nowhere_is_told_the_limit():
    async with fleet_of_fakes(num_prefill=0, num_decode=2, local_tokens=64) as fleet:
        with pytest.raises(NoWorker, match=r"up to 64 tokens themselves; the prompt has 100: start a prefill worker"):
            await answer(fleet, LONG)
        assert (await answer(fleet, LONG[:64]))[0] == fake_answer(LONG[:64], 8)


async def test_nobody_offers_and_nobody_prefills_is_not_ready():
    async with fleet_of_fakes(num_prefill=0, num_decode=1) as fleet:
        assert not fleet.pipeline.readiness().ready
        with pytest.raises(NoWorker, match="no live prefill worker"):
            await answer(fleet, PROMPT)


async def test_short_prompts_stay_and_long_ones_go_to_prefill():
    async with fleet_of_fakes(local_tokens=64) as fleet:
        for number in range(4):
            await answer(fleet, [number + 1] * 9)
        assert (sum(num_local(fleet)), sum(fleet.load_of(Role.PREFILL))) == (4, 0)
        assert placements(fleet, "local", "cheaper") == 4
        tokens, _ = await answer(fleet, LONG)
        assert tokens == fake_answer(LONG, 8)
        assert (sum(num_local(fleet)), sum(fleet.load_of(Role.PREFILL))) == (4, 1)
        assert placements(fleet, "remote", "too_long") == 1


async def test_nobody_s_answer_waits_for_a_local_prefill_while_a_prefill_worker_is_idle():
    """Both are known for a thousand tokens a second: to an answer that runs, a prompt of 100 would be felt."""
    async with fleet_of_fakes(num_prefill=1, num_decode=1, local_tokens=128) as fleet:
        for worker in (fleet["prefill-0"].worker, fleet["decode-0"].beside.worker):
            worker._meter._timer.add(1000, 1.0)
        await fleet.beat()
        fleet["decode-0"].gate.is_open = False
        running = asyncio.create_task(answer(fleet, LONG, 20))
        await until(lambda: num_local(fleet) == [1])
        async with aclosing(fleet.pipeline.generate(make_request(LONG, 50, request_id="other"))) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    break
        assert (num_local(fleet), fleet.load_of(Role.PREFILL)) == ([1], [1])
        fleet["decode-0"].gate.let_all()
        assert (await running)[0] == fake_answer(LONG, 20)


@pytest.mark.parametrize("seed", range(4))
async def test_the_second_turn_goes_where_the_first_one_was_prefilled(seed):
    async with fleet_of_fakes(num_prefill=1, num_decode=3, local_tokens=128, seed=seed) as fleet:
        await answer(fleet, [*SHARED, 7])
        (home,) = [member.local.worker_id for member in fleet.members.values() if member.local and member.local.seen]
        await fleet.until_indexed(SHARED, home)
        for tail in range(3):
            tokens, usage = await answer(fleet, [*SHARED, 40 + tail, 41])
            assert tokens == fake_answer([*SHARED, 40 + tail, 41], 8)
            assert usage.num_cached_tokens == len(SHARED)
        assert sorted(num_local(fleet)) == [0, 0, 4]


async def test_packing_is_the_same_wherever_the_prompt_is_prefilled():
    pack = PackSpec("streaming_llm", budget_tokens=16, window=4, sinks=4)
    async with fleet_of_fakes(num_prefill=1, num_decode=1, local_tokens=64) as fleet:
        local, local_usage = await answer(fleet, LONG[:60], pack=pack)
        assert num_local(fleet) == [1]
        fleet["decode-0"].local.tamper = lambda event: [QueueFull("full", retry_after_s=1.0)]
        remote, remote_usage = await answer(fleet, LONG[:60], pack=pack)
        assert fleet.load_of(Role.PREFILL) == [1]
        kept = [*range(4), *range(48, 60)]
        assert local == remote == fake_answer(LONG[:60], 8, kept=kept)
        assert local_usage.kv == remote_usage.kv


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_when_prefill_dies_long_prompts_go_on_where_they_fit():
    """At once by a retry, and from then on without trying the dead one first."""
    async with fleet_of_fakes(num_prefill=1, num_decode=2, local_tokens=128) as fleet:
        for member in fleet.members.values():
            if member.beside:  # so slow that nobody would choose it
                member.beside.worker._meter._timer.add(10, 10.0)
        await fleet.beat()
        await answer(fleet, LONG)
        assert fleet.load_of(Role.PREFILL) == [1]
        fleet["prefill-0"].link.num_tokens_until_cut = 0
        tokens, _ = await answer(fleet, LONG)
        assert tokens == fake_answer(LONG, 8)
        assert fleet.retries("WorkerLost") == 1
        for _ in range(3):
            assert (await answer(fleet, LONG))[0] == fake_answer(LONG, 8)
        assert fleet.retries("WorkerLost") == 1, "a suspect is passed over while somebody else can prefill"
        assert fleet.load_of(Role.PREFILL) == [2]


async def test_a_local_prefill_that_refuses_is_tried_elsewhere_with_the_same_decode_worker():
    async with fleet_of_fakes(num_prefill=1, num_decode=1, local_tokens=128) as fleet:
        fleet["decode-0"].local.tamper = lambda event: [QueueFull("full", retry_after_s=1.0)]
        tokens, _ = await answer(fleet, PROMPT)
        assert tokens == fake_answer(PROMPT, 8)
        assert fleet.retries("QueueFull") == 1
        assert fleet.load_of(Role.DECODE) == [2]
        assert fleet.load_of(Role.PREFILL) == [1]
        assert not fleet.view.is_suspect(fleet["decode-0"].info())


async def test_without_anybody_else_the_local_refusal_is_what_the_client_hears():
    async with fleet_of_fakes(num_prefill=0, num_decode=1, local_tokens=128) as fleet:
        fleet["decode-0"].local.tamper = lambda event: [QueueFull("full", retry_after_s=1.0)]
        _, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert isinstance(end.error, QueueFull)


async def test_prompts_that_do_not_fit_together_wait_for_each_other():
    async with fleet_of_fakes(num_prefill=0, num_decode=1, local_tokens=64) as fleet:
        prompts = [[number + 1] * 50 for number in range(6)]
        answers = await asyncio.gather(
            *(answer(fleet, prompt, request_id=str(number)) for number, prompt in enumerate(prompts))
        )
        assert [tokens for tokens, _ in answers] == [fake_answer(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("num_before", [1, 5])
async def test_a_lost_decode_worker_s_answer_goes_on_at_another_that_prefills(num_before):
    async with fleet_of_fakes(num_prefill=0, num_decode=2, local_tokens=128) as fleet:
        fleet["decode-0"].link.num_tokens_until_cut = num_before
        tokens, _ = await answer(fleet, PROMPT, 12)
        was_broken = bool(fleet["decode-0"].link.seen)
        assert tokens == (broken_answer(PROMPT, 12, [num_before]) if was_broken else fake_answer(PROMPT, 12))
        assert fleet.retries(WorkerLost.__name__) == was_broken


async def test_a_draining_decode_worker_prefills_for_its_own_requests_only():
    async with fleet_of_fakes(num_prefill=0, num_decode=1, local_tokens=128) as fleet:
        fleet["decode-0"].gate.is_open = False
        running = asyncio.create_task(answer(fleet, PROMPT, 20))
        await until(lambda: num_local(fleet) == [1])
        fleet["decode-0"].worker.drain()
        await fleet.beat()
        with pytest.raises(NoWorker):
            await answer(fleet, PROMPT, request_id="late")
        fleet["decode-0"].gate.let_all()
        assert (await running)[0] == fake_answer(PROMPT, 20)


async def test_many_answers_while_workers_come_and_go():
    config, decode = RouterConfig(max_attempts=5), DecodeConfig(max_batch=3, max_stall_s=1e-6)
    async with fleet_of_fakes(num_prefill=1, num_decode=3, router=config, decode=decode, local_tokens=128) as fleet:

        async def storm():
            for round_ in range(9):
                name = f"decode-{round_ % 3}" if round_ % 2 else "prefill-0"
                fleet[name].link.num_tokens_until_cut = 2 if round_ % 2 else 0
                await asyncio.sleep(0.01)
                fleet[name].link.num_tokens_until_cut = None

        prompts = [[number % 40 + 1] * (5 + 7 * (number % 13)) for number in range(40)]
        storming = asyncio.create_task(storm())
        results = await asyncio.gather(
            *(events_of(fleet.pipeline.generate(make_request(p, 10, request_id=str(n)))) for n, p in enumerate(prompts))
        )
        await storming
        assert sum(num_local(fleet)) > 0
    for prompt, (tokens, end) in zip(prompts, results, strict=True):
        assert isinstance(end, Finished), end
        breaks = [at for at in range(1, 10) if tokens[at] == (sum(prompt) + sum(tokens[:at]) + 1) % 256]
        assert tokens == broken_answer(prompt, 10, breaks)
