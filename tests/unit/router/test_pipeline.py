"""The pipeline over real workers with the arithmetic model: placement, retries, resumption, and ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from packlight.compress.policy import Decision, Plan
from packlight.core.config import DecodeConfig, PrefillConfig, RouterConfig
from packlight.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    NoWorker,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    WorkerLost,
)
from packlight.core.shipping import Chunk, FirstToken, LayerHeader
from packlight.core.types import Failed, Finished, PackSpec, Progress, Tokens
from packlight.core.workers import Role
from packlight.models.fake import PREFILL_BIAS, fake_answer
from packlight.prefix.memory import MemoryPrefixIndex
from packlight.router.service import Decided
from tests.support.fake_pair import make_request, until
from tests.support.fleet_of_fakes import FleetOfFakes, broken_answer, events_of, fleet_of_fakes

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SHARED = list(range(1, 33))
PREFILLS = ("prefill-0", "prefill-1")
DECODES = ("decode-0", "decode-1")


async def answer(fleet: FleetOfFakes, prompt: list[int], num_tokens: int = 8, **kwargs):
    tokens, end = await events_of(fleet.pipeline.generate(make_request(prompt, num_tokens, **kwargs)))
    assert isinstance(end, Finished), end
    return tokens, end.usage


def chosen(fleet: FleetOfFakes, role: Role) -> list[str]:
    """The workers of the role that have seen a request."""
    return [name for name, m in fleet.members.items() if m.identity.role is role and m.link.seen]


# ── placement ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer():
    async with fleet_of_fakes() as fleet:
        tokens, usage = await answer(fleet, PROMPT, request_id="a")
        assert tokens == fake_answer(PROMPT, 8)
        assert (usage.num_prompt_tokens, usage.num_generated_tokens) == (11, 8)
        (decode,) = chosen(fleet, Role.DECODE)
        (sent,) = fleet[decode].link.seen
        (prefill,) = chosen(fleet, Role.PREFILL)
        assert (sent.prefill_id, sent.prefill_address) == (prefill, f"{prefill}:1")


async def test_events_carry_the_request_s_own_id_whatever_the_attempt():
    async with fleet_of_fakes() as fleet:
        fleet["decode-0"].link.num_tokens_until_cut = fleet["decode-1"].link.num_tokens_until_cut = 3
        source = fleet.pipeline.generate(make_request(PROMPT, request_id="mine"))
        async with aclosing(source) as events:
            assert {event.request_id async for event in events} == {"mine"}


@pytest.mark.parametrize("seed", range(6))
async def test_a_prefix_draws_its_next_request(seed):
    async with fleet_of_fakes(seed=seed) as fleet:
        await answer(fleet, [*SHARED, 7])
        (home,) = chosen(fleet, Role.PREFILL)
        await fleet.until_indexed(SHARED, home)
        for tail in range(3):
            _, usage = await answer(fleet, [*SHARED, 40 + tail, 41])
            assert usage.num_cached_tokens == len(SHARED)
        assert chosen(fleet, Role.PREFILL) == [home]


async def test_other_tenants_do_not_see_the_prefix():
    async with fleet_of_fakes() as fleet:
        await answer(fleet, [*SHARED, 7], cache_salt="a")
        _, other = await answer(fleet, [*SHARED, 7], cache_salt="b")
        assert other.num_cached_tokens == 0


async def test_requests_at_once_are_spread_over_all_workers():
    async with fleet_of_fakes() as fleet:
        for member in fleet.members.values():
            member.gate.is_open = False
        tasks = [asyncio.create_task(answer(fleet, [i + 1] * 200, request_id=str(i))) for i in range(8)]
        await until(lambda: sum(fleet.load_of(Role.PREFILL)) == 8)
        assert fleet.load_of(Role.PREFILL) == [4, 4]
        assert fleet.load_of(Role.DECODE) == [4, 4]
        for member in fleet.members.values():
            member.gate.let_all()
        for number, (tokens, _) in enumerate(await asyncio.gather(*tasks)):
            assert tokens == fake_answer([number + 1] * 200, 8)


async def test_a_draining_worker_gets_nothing_new():
    async with fleet_of_fakes() as fleet:
        for name in ("prefill-0", "decode-1"):
            fleet[name].worker.drain()
        await fleet.beat()
        for number in range(4):
            await answer(fleet, [number + 1] * 9)
        assert chosen(fleet, Role.PREFILL) == ["prefill-1"]
        assert chosen(fleet, Role.DECODE) == ["decode-0"]


class AwayIndex(MemoryPrefixIndex):
    """What the index in Redis does while Redis is away."""

    available = False

    async def match(self, fingerprint, hashes):
        return {}


async def test_without_the_index_load_alone_decides_and_health_says_so():
    async with fleet_of_fakes(index=AwayIndex(100)) as fleet:
        for _ in range(3):
            tokens, _ = await answer(fleet, [*SHARED, 7])
            assert tokens == fake_answer([*SHARED, 7], 8)
        readiness = fleet.pipeline.readiness()
        assert readiness.ready
        assert "away" in readiness.details["prefix_index"]
        assert fleet.registry.get_sample_value("packlight_router_index_available") == 0.0


# ── before the first token: made again, unseen ───────────────────────────────────────────────────────────────────────


def lose_worker(link):
    link.num_tokens_until_cut = 0


def corrupt(link):
    """Flips a bit of every chunk; the first token is lost too, so that the client has seen nothing."""

    def tamper(event):
        if isinstance(event, Chunk):
            return [Chunk(bytes(byte ^ 1 for byte in event.data))]
        return [] if isinstance(event, FirstToken) else [event]

    link.tamper = tamper


def refuse(link):
    link.tamper = lambda event: [QueueFull("full", retry_after_s=1.0, worker_id=link.worker_id)]


def drain(link):
    link.worker.drain()


@pytest.mark.parametrize(
    ("harm", "names", "error"),
    [
        (lose_worker, PREFILLS, WorkerLost),
        (lose_worker, DECODES, WorkerLost),
        (corrupt, PREFILLS, ShipmentCorrupt),
        (refuse, PREFILLS, QueueFull),
        (refuse, DECODES, QueueFull),
        (drain, PREFILLS, Draining),
        (drain, DECODES, Draining),
    ],
)
async def test_a_failure_before_the_first_token_is_retried_without_the_culprit(harm, names, error):
    for seed in range(4):  # whichever of the two is tried first
        async with fleet_of_fakes(seed=seed) as fleet:
            harm(fleet[names[0]].link)
            tokens, usage = await answer(fleet, PROMPT)
            assert tokens == fake_answer(PROMPT, 8)
            assert usage.num_generated_tokens == 8
            num_tries = len(fleet[names[0]].link.seen)
            assert num_tries <= 1
            assert fleet.retries(error.__name__) == num_tries
            assert len(fleet[names[1]].link.seen) == 1


async def test_each_attempt_has_an_id_of_its_own_and_less_time():
    async with fleet_of_fakes(num_prefill=1, num_decode=2) as fleet:
        for name in DECODES:
            refuse(fleet[name].link)
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT, request_id="r", deadline_s=30.0)))
        sent = [*fleet["decode-0"].link.seen, *fleet["decode-1"].link.seen]
    assert {request.request_id for request in sent} == {"r.0", "r.1"}
    assert all(29.0 < request.deadline_s <= 30.0 for request in sent)
    assert tokens == []
    assert isinstance(end.error, QueueFull)


@pytest.mark.parametrize(("max_attempts", "num_tries"), [(1, 1), (2, 2), (3, 3), (5, 4)])
async def test_max_attempts(max_attempts, num_tries):
    async with fleet_of_fakes(num_decode=4, router=RouterConfig(max_attempts=max_attempts)) as fleet:
        for number in range(4):
            refuse(fleet[f"decode-{number}"].link)
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert tokens == []
        assert isinstance(end, Failed)
        assert isinstance(end.error, QueueFull), "nobody is left, but the last error says why"
        assert end.error.retry_after_s == 1.0
        assert sorted(fleet.load_of(Role.DECODE), reverse=True) == [1] * num_tries + [0] * (4 - num_tries)
        assert fleet.retries("QueueFull") == num_tries - 1


async def test_what_the_request_did_wrong_is_not_tried_twice():
    async with fleet_of_fakes() as fleet:
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT, 5000)))
        assert tokens == []
        assert isinstance(end.error, RequestNeverFits)
        assert sum(fleet.load_of(Role.DECODE)) == 1


async def test_a_bug_is_not_tried_twice():
    async with fleet_of_fakes() as fleet:
        for name in DECODES:
            fleet[name].gate.error = ValueError("boom")
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert tokens == fake_answer(PROMPT, 1)
        assert isinstance(end.error, InternalError)
        assert sum(fleet.load_of(Role.DECODE)) == 1


async def test_a_deadline_holds_over_all_attempts():
    async with fleet_of_fakes() as fleet:
        for name in PREFILLS:
            fleet[name].gate.is_open = False
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT, deadline_s=0.05)))
        assert tokens == []
        assert isinstance(end.error, DeadlineExceeded)
        assert sum(fleet.load_of(Role.DECODE)) == 1


# ── after it: resumed, and the stream goes on ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_before", [1, 2, 5, 11])
async def test_a_lost_decode_worker_s_answer_is_resumed_on_the_other(num_before):
    for seed in range(3):
        async with fleet_of_fakes(seed=seed) as fleet:
            fleet["decode-0"].link.num_tokens_until_cut = num_before
            tokens, usage = await answer(fleet, PROMPT, 12)
            was_broken = bool(fleet["decode-0"].link.seen)
            expected = broken_answer(PROMPT, 12, [num_before]) if was_broken else fake_answer(PROMPT, 12)
            assert tokens == expected
            assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens) == (11, 0, 12)
            if was_broken:
                (resumed,) = fleet["decode-1"].link.seen
                assert resumed.token_ids == (*PROMPT, *tokens[:num_before])
                assert resumed.num_prompt_tokens == len(PROMPT)
                assert fleet.retries("WorkerLost") == 1


async def test_the_seeds_above_send_some_answers_to_the_worker_that_is_lost():
    firsts = set()
    for seed in range(3):
        async with fleet_of_fakes(seed=seed) as fleet:
            await answer(fleet, PROMPT, 12)
            firsts |= set(chosen(fleet, Role.DECODE))
    assert "decode-0" in firsts


async def test_a_resumed_answer_is_billed_as_an_unbroken_one():
    """The prefix that the first try left in the cache was not there when the client asked."""
    async with fleet_of_fakes(num_prefill=1) as fleet:
        for name in DECODES:
            fleet[name].link.num_tokens_until_cut = 5
        tokens, usage = await answer(fleet, SHARED, 9)
        assert tokens == broken_answer(SHARED, 9, [5])
        assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens) == (32, 0, 9)


async def test_a_shipment_that_breaks_after_the_first_token_is_resumed_elsewhere():
    """The first token overtakes the pages, so the client has it when they turn out to be damaged."""
    async with fleet_of_fakes(router=RouterConfig(max_attempts=3)) as fleet:

        def first_token_then_silence(event):
            if isinstance(event, LayerHeader | Chunk):
                return []
            return [event]

        fleet["prefill-0"].link.tamper = first_token_then_silence
        fleet["prefill-1"].worker.drain()
        await fleet.beat()
        source = fleet.pipeline.generate(make_request(PROMPT))
        async with aclosing(source) as events:
            first = await anext(events)
            while not isinstance(first, Tokens):
                first = await anext(events)
            fleet["prefill-1"].worker.draining = False
            await fleet.beat()
            rest = [event async for event in events]
        tokens = [t.token_id for e in [first, *rest] if isinstance(e, Tokens) for t in e.tokens]
        assert tokens == broken_answer(PROMPT, 8, [1])
        assert isinstance(rest[-1], Finished)
        assert fleet.retries("ShipmentCorrupt") == 1


async def test_several_losses_in_one_answer():
    async with fleet_of_fakes(num_decode=4, router=RouterConfig(max_attempts=4)) as fleet:
        for number in range(4):
            fleet[f"decode-{number}"].link.num_tokens_until_cut = 3
        tokens, usage = await answer(fleet, PROMPT, 11)
        assert tokens == broken_answer(PROMPT, 11, [3, 6, 9])
        assert usage.num_generated_tokens == 11
        assert fleet.load_of(Role.DECODE) == [1, 1, 1, 1]


@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_a_worker_lost_after_the_last_token_costs_nothing(max_attempts):
    async with fleet_of_fakes(num_decode=3, router=RouterConfig(max_attempts=max_attempts)) as fleet:
        for number in range(3):
            fleet[f"decode-{number}"].link.num_tokens_until_cut = 8
        tokens, usage = await answer(fleet, PROMPT)
        assert tokens == fake_answer(PROMPT, 8)
        assert (usage.num_prompt_tokens, usage.num_generated_tokens) == (11, 8)
        assert sum(fleet.load_of(Role.DECODE)) == 1


async def test_an_answer_that_nobody_can_resume_ends_with_the_error_that_broke_it():
    async with fleet_of_fakes(num_decode=1) as fleet:
        fleet["decode-0"].link.num_tokens_until_cut = 4
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert tokens == fake_answer(PROMPT, 4)
        assert isinstance(end, Failed)
        assert isinstance(end.error, WorkerLost)


async def test_progress_is_passed_on():
    async with fleet_of_fakes() as fleet, aclosing(fleet.pipeline.generate(make_request(PROMPT))) as events:
        received = [event async for event in events]
    assert any(isinstance(event, Progress) for event in received)


# ── nobody there ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_empty_fleet_is_an_error_before_the_first_event():
    async with fleet_of_fakes(num_prefill=0, num_decode=0) as fleet:
        with pytest.raises(NoWorker, match="no live prefill and no live decode worker") as missing:
            await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert missing.value.retry_after_s is not None
        assert not fleet.pipeline.readiness().ready


async def test_the_only_pair_is_not_tried_twice():
    async with fleet_of_fakes(num_prefill=1, num_decode=1) as fleet:
        refuse(fleet["prefill-0"].link)
        tokens, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert tokens == []
        assert isinstance(end.error, QueueFull)
        assert fleet.load_of(Role.PREFILL) == [1]


# ── suspects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def until_it_is_tried(fleet: FleetOfFakes, worker_id: str, num_times: int = 1) -> None:
    """Prompts without a common prefix, until chance has sent one to the worker."""
    for number in range(1, 60):
        await answer(fleet, [number, *PROMPT])
        if len(fleet[worker_id].link.seen) == num_times:
            return
    raise AssertionError(f"{worker_id} was never tried")


async def test_a_lost_worker_is_left_alone_until_it_is_heard_of_again():
    async with fleet_of_fakes() as fleet:
        lose_worker(fleet["decode-0"].link)
        await until_it_is_tried(fleet, "decode-0")
        for number in range(6):
            await answer(fleet, [number + 1] * 9)
        assert len(fleet["decode-0"].link.seen) == 1
        fleet["decode-0"].link.num_tokens_until_cut = None
        fleet.clock.advance(1.0)
        await fleet.beat()
        await until_it_is_tried(fleet, "decode-0", 2)


@pytest.mark.parametrize("names", [PREFILLS, DECODES])
async def test_when_all_of_a_role_are_suspect_they_are_tried_all_the_same(names):
    async with fleet_of_fakes() as fleet:
        for name in names:
            lose_worker(fleet[name].link)
        _, end = await events_of(fleet.pipeline.generate(make_request(PROMPT)))
        assert isinstance(end.error, WorkerLost)
        assert all(fleet.view.is_suspect(fleet[name].info()) for name in names)
        assert fleet.pipeline.readiness().ready
        for name in names:
            fleet[name].link.num_tokens_until_cut = None
        tokens, _ = await answer(fleet, PROMPT)
        assert tokens == fake_answer(PROMPT, 8)


async def test_a_full_worker_is_not_a_suspect():
    async with fleet_of_fakes() as fleet:
        refuse(fleet["decode-0"].link)
        await until_it_is_tried(fleet, "decode-0")
        assert not any(fleet.view.is_suspect(worker) for worker in fleet.view.workers())


async def test_the_prefill_worker_is_blamed_when_decode_says_so():
    async with fleet_of_fakes() as fleet:
        lose_worker(fleet["prefill-0"].link)
        await until_it_is_tried(fleet, "prefill-0")
        suspects = [member.worker_id for member in fleet.members.values() if fleet.view.is_suspect(member.info())]
        assert suspects == ["prefill-0"]


# ── how the prompt is packed: settled by the first place, and kept ────────────────────────────────────────────────────

# Budgets that cover every prompt here, so that the arithmetic stays that of exact KV.
USUAL = PackSpec("h2o", budget_tokens=4000)
ON_HIT = PackSpec("snapkv", budget_tokens=4000)
PLAN = Plan(Decision(USUAL, "long"), Decision(ON_HIT, "long, and cached"), hit_tokens=16)


async def planned(fleet: FleetOfFakes, prompt: list[int], plan: Plan = PLAN, num_tokens: int = 8):
    """(decisions, tokens, terminal event)"""
    decisions, events = [], []

    async def without_decisions():
        async with aclosing(fleet.pipeline.generate(make_request(prompt, num_tokens, pack=USUAL), plan)) as source:
            async for event in source:
                if isinstance(event, Decided):
                    decisions.append((event.request_id, event.decision, len(events)))
                    continue
                events.append(event)
                yield event

    return decisions, *await events_of(without_decisions())


def packs_seen(fleet: FleetOfFakes) -> list[PackSpec]:
    return [request.pack for name in DECODES for request in fleet[name].link.seen]


async def test_a_prompt_that_is_cached_where_it_goes_is_packed_as_for_a_hit():
    async with fleet_of_fakes() as fleet:
        decisions, tokens, _ = await planned(fleet, [*SHARED, 7])
        assert decisions == [("r", PLAN.usual, 0)]
        assert tokens == fake_answer([*SHARED, 7], 8)
        (home,) = chosen(fleet, Role.PREFILL)
        await fleet.until_indexed(SHARED, home)
        decisions, tokens, _ = await planned(fleet, [*SHARED, 8])
        assert decisions == [("r", PLAN.on_hit, 0)]
        assert tokens == fake_answer([*SHARED, 8], 8)
        assert sorted(pack.recipe for pack in packs_seen(fleet)) == ["h2o", "snapkv"]
        assert chosen(fleet, Role.PREFILL) == [home], "the hit draws the request, though it would usually not be used"


async def test_too_small_a_hit_changes_nothing():
    async with fleet_of_fakes() as fleet:
        await answer(fleet, SHARED)
        (home,) = chosen(fleet, Role.PREFILL)
        await fleet.until_indexed(SHARED, home)
        decisions, _, _ = await planned(fleet, [*SHARED, 8], replace(PLAN, hit_tokens=33))
        assert [decision for _, decision, _ in decisions] == [PLAN.usual]


async def test_without_a_plan_the_request_decides():
    async with fleet_of_fakes() as fleet:
        source = fleet.pipeline.generate(make_request(PROMPT, pack=ON_HIT))
        async with aclosing(source) as events:
            assert await anext(events) == Decided("r", Decision(ON_HIT))


@pytest.mark.parametrize("num_before", [0, 4])
async def test_whoever_takes_over_packs_as_the_first_one_did(num_before):
    """Even though by then the prompt is cached, and a new request would be packed otherwise."""
    async with fleet_of_fakes(num_prefill=1) as fleet:
        for name in DECODES:
            fleet[name].link.num_tokens_until_cut = num_before or None
        if not num_before:
            refuse(fleet["decode-0"].link)
            refuse(fleet["decode-1"].link)
        decisions, _, _ = await planned(fleet, SHARED, num_tokens=7)
        assert [decision for _, decision, _ in decisions] == [PLAN.usual]
        assert packs_seen(fleet) == [USUAL, USUAL]
        await fleet.until_indexed(SHARED, "prefill-0")


async def test_a_prompt_whose_cache_is_no_use_is_not_looked_up():
    class Counting(MemoryPrefixIndex):
        num_matches = 0

        async def match(self, fingerprint, hashes):
            self.num_matches += 1
            return await super().match(fingerprint, hashes)

    index = Counting(1000)
    async with fleet_of_fakes(index=index) as fleet:
        await answer(fleet, [*SHARED, *SHARED], pack=PackSpec("h2o", ratio=0.75))
        assert index.num_matches == 0
        await answer(fleet, SHARED, pack=ON_HIT)
        await planned(fleet, SHARED)
        assert index.num_matches == 2


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_read", [0, 1, 2, 5])
async def test_closing_the_generator_cancels_everything_behind_it(num_read):
    async with fleet_of_fakes() as fleet:
        async with aclosing(fleet.pipeline.generate(make_request(PROMPT, 200))) as events:
            for _ in range(num_read):
                await anext(events)
        async with asyncio.timeout(60):
            await until(fleet.is_idle)
        fleet.check_idle()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_cancelling_the_reader_cancels_everything_behind_it(side):
    async with fleet_of_fakes() as fleet:
        for member in fleet.members.values():
            member.gate.is_open = member.identity.role.value != side
        reading = asyncio.create_task(answer(fleet, PROMPT, 200))
        await until(lambda: not fleet.is_idle())
        await asyncio.sleep(0.02)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        for member in fleet.members.values():
            member.gate.let_all()
        async with asyncio.timeout(60):
            await until(fleet.is_idle)


async def test_many_answers_over_workers_that_come_and_go():
    """Whatever breaks, each answer is one of those that arithmetic allows, and nothing is left behind."""
    config = RouterConfig(max_attempts=5)
    async with fleet_of_fakes(
        num_decode=4, router=config, decode=DecodeConfig(max_batch=3), prefill=PrefillConfig(chunk_tokens=16)
    ) as fleet:

        async def storm():
            for round_ in range(12):
                link = fleet[f"decode-{round_ % 4}"].link
                link.num_tokens_until_cut = 2 + round_ % 5
                await asyncio.sleep(0.01)
                link.num_tokens_until_cut = None

        prompts = [[number % 40 + 1] * (5 + number % 17) for number in range(60)]
        storming = asyncio.create_task(storm())
        results = await asyncio.gather(
            *(events_of(fleet.pipeline.generate(make_request(p, 10, request_id=str(n)))) for n, p in enumerate(prompts))
        )
        await storming
    for prompt, (tokens, end) in zip(prompts, results, strict=True):
        assert isinstance(end, Finished), end
        assert tokens == broken_answer(prompt, 10, breaks_in(prompt, tokens))


def breaks_in(prompt: list[int], tokens: list[int]) -> list[int]:
    """Where the answer was resumed: the tokens that are prefill's."""
    return [at for at in range(1, len(tokens)) if tokens[at] == (sum(prompt) + sum(tokens[:at]) + PREFILL_BIAS) % 256]
