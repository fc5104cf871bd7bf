"""Prefill and decode together, with answers worked out by hand: batching, prefix hits, packing, ends, failures."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    ShipmentIncompatible,
    WorkerLost,
)
from packlight.core.shipping import Accepted, Chunk, FirstToken, LayerHeader, Shipped
from packlight.core.types import Failed, Finished, FinishReason, PackSpec, StopRules, Token, Tokens
from packlight.models.fake import fake_answer
from packlight.models.fake_spec import FAKE_VOCABULARY
from packlight.transfer.base import checksum
from packlight.wire.manifest import decode_manifest, encode_manifest
from tests.support.fake_pair import answer, collect, fake_pair, make_request, until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


async def test_an_answer_by_hand():
    async with fake_pair() as pair:
        # Prefill: sum(prompt) + 1 = 45. Decode: 44 + 45 + 2 = 91, then 44 + 45 + 91 + 2 = 182, ...
        assert (await answer(pair.decode, make_request(PROMPT)))[:3] == [45, 91, 182]
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 512])
async def test_many_at_once_get_what_each_gets_alone(chunk_tokens):
    prompts = [[i % 7 + 1, *PROMPT[: i % 5], *([2] * i)] for i in range(12)]
    async with fake_pair(prefill=PrefillConfig(chunk_tokens=chunk_tokens), decode=DecodeConfig(max_batch=5)) as pair:
        requests = [make_request(p, 3 + i, request_id=str(i)) for i, p in enumerate(prompts)]
        answers = await asyncio.gather(*(answer(pair.decode, request) for request in requests))
    assert answers == [fake_answer(p, 3 + i) for i, p in enumerate(prompts)]


async def test_usage_says_what_was_done():
    async with fake_pair() as pair:
        await answer(pair.decode, make_request(PROMPT))
        _, event = await collect(pair.decode, make_request(PROMPT, 5))
    assert isinstance(event, Finished)
    assert event.reason is FinishReason.LENGTH
    usage = event.usage
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens) == (11, 8, 5)
    assert usage.kv.recipe == "none"
    assert usage.kv.num_kept_tokens == 11
    assert usage.kv.exact_bytes == 11 * 2 * 2 * 4
    assert usage.kv.shipped_bytes == 12 * 2 * 2 * 4  # whole pages
    assert usage.kv.retained_mass == 1.0


async def test_packed_kv_is_what_decode_sees():
    """StreamingLLM keeps sinks and recent tokens: decode sums those only, prefill sums all."""
    prompt = list(range(1, 41))
    pack = PackSpec("streaming_llm", budget_tokens=10, window=4, sinks=2)
    kept = [0, 1, *range(32, 40)]
    async with fake_pair() as pair:
        tokens, event = await collect(pair.decode, make_request(prompt, 6, pack=pack))
        assert tokens == fake_answer(prompt, 6, kept=kept)
        assert event.usage.kv.num_kept_tokens == 10
        assert event.usage.kv.shipped_bytes == 3 * 4 * 2 * 2 * 4
        # The exact KV stayed behind, for the next question about the same prompt.
        _, second = await collect(pair.decode, make_request(prompt, 6))
        assert second.usage.num_cached_tokens == 36


async def test_packed_requests_take_fewer_pages():
    prompt = list(range(1, 41))
    pack = PackSpec("streaming_llm", budget_tokens=8, window=4, sinks=2)
    async with fake_pair(decode_blocks=12) as pair:
        # 40 prompt tokens and 8 more take 12 pages exact: one fits. Packed, 4 pages: three fit.
        held = []
        for request_pack, expected in ((None, 1), (pack, 3)):
            pair.decode_gate.is_open = False
            tasks = [
                asyncio.create_task(answer(pair.decode, make_request(prompt, 8, request_id=str(i), pack=request_pack)))
                for i in range(4)
            ]
            await until(lambda n=expected: pair.decode.load().num_running == n)
            held.append(pair.decode.load().num_running)
            pair.decode_gate.let_all()
            await asyncio.gather(*tasks)
        assert held == [1, 3]


# ── reservations follow what really arrives ──────────────────────────────────────────────────────────────────────────


def floored(floor, budget=8):
    """The arithmetic model attends evenly: a floor of 0.5 keeps half of the prompt, and a little more because the
    window's own tokens are hidden from some of its rows."""
    return PackSpec("streaming_llm", budget_tokens=budget, window=4, sinks=2, mass_floor=floor)


async def test_a_mass_floor_takes_more_pages_than_the_bound():
    prompt = [1] * 40
    async with fake_pair(decode_blocks=16) as pair:
        pair.decode_gate.is_open = False
        running = asyncio.create_task(collect(pair.decode, make_request(prompt, 8, pack=floored(0.5))))
        await until(lambda: pair.decode._memory.book.num_held >= 5)
        load = pair.decode.load()
        assert load.num_total_pages - load.num_free_pages == 8  # 21 tokens and 8 new ones; the bound is 8 and 8: 4
        pair.decode_gate.let_all()
        _, event = await running
        assert event.usage.kv.num_kept_tokens == 21
        assert event.usage.kv.num_grown_tokens == 13


async def test_growth_never_waits_and_fails_as_retryable():
    """One request holds 12 of 16 pages; the other is admitted by its bound of 4 and would need 8."""
    async with fake_pair(decode_blocks=16) as pair:
        pair.decode_gate.is_open = False
        first = asyncio.create_task(answer(pair.decode, make_request([1] * 40, 8, request_id="1")))
        await until(lambda: pair.decode._memory.book.num_held >= 10)
        _, event = await collect(pair.decode, make_request([1] * 40, 8, request_id="2", pack=floored(0.5)))
        assert isinstance(event.error, QueueFull)
        assert event.error.retryable
        assert event.error.retry_after_s is not None
        assert event.error.worker_id is None, "not the prefill worker's fault: the router blames who answered"
        assert "takes 8 KV head pages so far, 4 are reserved and 0 of 16 are free" in event.error.message
        assert pair.decode.load().num_free_pages == 4
        pair.decode_gate.let_all()
        assert await first == fake_answer([1] * 40, 8)


async def test_what_the_floor_can_never_have_is_refused_for_good():
    async with fake_pair(decode_blocks=6) as pair:
        _, event = await collect(pair.decode, make_request([1] * 40, 8, pack=floored(0.9)))
        assert isinstance(event.error, RequestNeverFits)
        assert not event.error.retryable


async def test_what_is_not_needed_lets_others_in():
    """`mass` reserves the whole prompt and mostly needs less: two run where the bounds would allow one."""
    pack = PackSpec("mass", budget_tokens=40, window=4, sinks=2, kernel=1, params=(("target", 0.05),))
    async with fake_pair(decode_blocks=20) as pair:
        pair.decode_gate.is_open = False
        requests = [make_request([1] * 41, 8, request_id=str(i), pack=pack) for i in range(2)]
        tasks = [asyncio.create_task(collect(pair.decode, request)) for request in requests]
        await until(lambda: pair.decode.load().num_running == 2)
        pair.decode.check()
        pair.decode_gate.let_all()
        for task in tasks:
            assert (await task)[1].usage.kv.num_kept_tokens == 7, "the window has the target's share already"


# ── eviction while decoding ──────────────────────────────────────────────────────────────────────────────────────────


def evicting(budget, recent, sinks=2):
    return PackSpec(
        "h2o", budget_tokens=budget, window=4, sinks=sinks, kernel=1, params=(("evict", 1.0), ("recent", recent))
    )


def h2o_answer(prompt, num_tokens, budget, recent, sinks=2):
    """By hand: attention is even, so token j of the prompt has the mass of the rows from j on, 1/1 + 1/2 + ..."""
    mass = [sum(1 / (row + 1) for row in range(position, len(prompt))) for position in range(len(prompt))]
    num_recent = int(recent * budget)
    heavy = sorted(range(sinks, len(prompt) - max(num_recent, 4)), key=lambda p: -mass[p])
    tail = range(len(prompt) - max(num_recent, 4), len(prompt))
    stored = {p: (prompt[p], mass[p]) for p in [*range(sinks), *heavy[: budget - sinks - len(tail)], *tail]}
    answer = [(sum(prompt) + 1) % 256]
    while len(answer) < num_tokens:
        if len(stored) == budget:
            safe = {*range(sinks), *sorted(stored)[budget - num_recent :]}
            del stored[min(stored.keys() - safe, key=lambda p: (stored[p][1], p))]
        stored[len(prompt) + len(answer) - 1] = (answer[-1], 0.0)
        stored = {p: (token, mass + 1 / len(stored)) for p, (token, mass) in stored.items()}
        answer.append((sum(token for token, _ in stored.values()) + 2) % 256)
    return answer


@pytest.mark.parametrize(
    ("budget", "recent", "transport"), [(12, 0.5, "inproc"), (9, 0.25, "grpc"), (13, 0.0, "inproc")]
)
async def test_h2o_goes_on_evicting_while_it_decodes(budget, recent, transport):
    prompt = [(7 * i) % 50 + 1 for i in range(40)]
    async with fake_pair(decode=DecodeConfig(transports=[transport])) as pair:
        pair.decode_gate.is_open = False
        request = make_request(prompt, 30, pack=evicting(budget, recent))
        running = asyncio.create_task(collect(pair.decode, request))
        await until(lambda: pair.decode.load().num_free_pages == 64 - -(-budget // 4))
        pair.decode_gate.let_all()
        tokens, event = await running
    assert tokens == h2o_answer(prompt, 30, budget, recent)
    assert event.usage.kv.num_kept_tokens == budget
    assert event.usage.kv.shipped_bytes == -(-budget // 4) * 4 * 2 * 2 * 4 + 4 * budget


async def test_evicting_and_other_requests_share_steps():
    prompt = [(7 * i) % 50 + 1 for i in range(40)]
    async with fake_pair() as pair:
        answers = await asyncio.gather(
            answer(pair.decode, make_request(prompt, 30, request_id="1", pack=evicting(12, 0.5))),
            answer(pair.decode, make_request(PROMPT, 20, request_id="2")),
            answer(pair.decode, make_request(prompt, 25, request_id="3", pack=evicting(9, 0.25))),
        )
    assert answers == [h2o_answer(prompt, 30, 12, 0.5), fake_answer(PROMPT, 20), h2o_answer(prompt, 25, 9, 0.25)]


async def test_a_short_prompt_grows_up_to_its_budget_and_evicts_from_then_on():
    async with fake_pair() as pair:
        pair.decode_gate.is_open = False
        running = asyncio.create_task(answer(pair.decode, make_request(PROMPT, 40, pack=evicting(16, 1.0))))
        await until(lambda: pair.decode.load().num_free_pages == 64 - 4)
        pair.decode_gate.let_all()
        tokens = await running
    # All is recent but the sinks and one token: the oldest goes.
    seen, expected = list(PROMPT), [(sum(PROMPT) + 1) % 256]
    while len(expected) < 40:
        seen = [*seen, expected[-1]] if len(seen) < 16 else [*seen[:2], *seen[3:], expected[-1]]
        expected.append((sum(seen) + 2) % 256)
    assert tokens == expected


# ── prefixes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_prefix_hits_do_not_change_answers():
    shared = list(range(1, 30))
    async with fake_pair(prefill_blocks=12) as pair:
        for tail in ([7], [7, 8, 9], [1] * 9, [7]):
            prompt = [*shared, *tail]
            tokens, event = await collect(pair.decode, make_request(prompt))
            assert tokens == fake_answer(prompt, 8)
        assert event.usage.num_cached_tokens == 28
        pair.prefill.check()


async def test_cache_salt_separates_tenants():
    async with fake_pair() as pair:
        await answer(pair.decode, make_request(PROMPT, cache_salt="a"))
        _, other = await collect(pair.decode, make_request(PROMPT, cache_salt="b"))
        _, same = await collect(pair.decode, make_request(PROMPT, cache_salt="a"))
    assert (other.usage.num_cached_tokens, same.usage.num_cached_tokens) == (0, 8)


async def test_more_prompts_than_blocks_wait_their_turn():
    prompts = [[i + 1] * 30 for i in range(6)]
    async with fake_pair(prefill_blocks=9) as pair:
        answers = await asyncio.gather(
            *(answer(pair.decode, make_request(p, request_id=str(i))) for i, p in enumerate(prompts))
        )
    assert answers == [fake_answer(p, 8) for p in prompts]


async def test_a_resumed_answer_goes_on_as_if_unbroken():
    """After a decode worker died: prompt + tokens so far, selection anchored at the prompt's end."""
    prompt = list(range(1, 41))
    whole = fake_answer(prompt, 12)
    async with fake_pair() as pair:
        rest = await answer(pair.decode, make_request(prompt, 12, resumed=whole[:5]))
        # The first token after the break is prefill's, which has its own bias; the sum goes on.
        expected = [(sum(prompt) + sum(whole[:5]) + 1) % 256]
        while len(expected) < 7:
            expected.append((sum(prompt) + sum(whole[:5]) + sum(expected) + 2) % 256)
        assert rest == expected
        pack = PackSpec("streaming_llm", budget_tokens=10, window=4, sinks=2)
        _, event = await collect(pair.decode, make_request(prompt, 12, resumed=whole[:5], pack=pack))
        assert event.usage.kv.num_kept_tokens == 15  # the budget, and every token generated earlier
        assert event.usage.num_generated_tokens == 12
        assert event.usage.num_prompt_tokens == 40


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_end_of_text_and_stop_tokens():
    expected = fake_answer(PROMPT, 8)
    async with fake_pair() as pair:
        for stop, num_tokens, reason in [
            (StopRules(8, eos_token_ids=(expected[2],)), 3, FinishReason.STOP),
            (StopRules(8, eos_token_ids=(expected[2],), ignore_eos=True), 8, FinishReason.LENGTH),
            (StopRules(8, stop_token_ids=(expected[0],)), 1, FinishReason.STOP),
            (StopRules(1), 1, FinishReason.LENGTH),
        ]:
            request = make_request(PROMPT)
            request = type(request)(**{f: getattr(request, f) for f in request.__slots__} | {"stop": stop})
            tokens, event = await collect(pair.decode, request)
            assert tokens == expected[:num_tokens]
            assert event.reason is reason


async def test_min_tokens_bans_the_end():
    expected = fake_answer(PROMPT, 4)
    stop = StopRules(4, eos_token_ids=(expected[0], expected[1]), min_tokens=2)
    async with fake_pair() as pair:
        request = make_request(PROMPT)
        request = type(request)(**{f: getattr(request, f) for f in request.__slots__} | {"stop": stop})
        tokens, _ = await collect(pair.decode, request)
    assert tokens[0] not in stop.eos_token_ids
    assert tokens[1] not in stop.eos_token_ids


# ── cancellation: the reader goes away at every stage ────────────────────────────────────────────────────────────────


async def test_cancel_while_queued():
    async with fake_pair(decode=DecodeConfig(max_batch=1)) as pair:
        pair.decode_gate.is_open = False
        first = asyncio.create_task(answer(pair.decode, make_request(PROMPT, request_id="1")))
        await until(lambda: pair.decode.load().num_running == 1)
        waiting = asyncio.create_task(answer(pair.decode, make_request(PROMPT, request_id="2")))
        await until(lambda: pair.decode.load().num_queued == 1)
        waiting.cancel()
        await until(lambda: pair.decode.load().num_queued == 0)
        pair.decode_gate.let_all()
        assert await first == fake_answer(PROMPT, 8)


async def test_cancel_while_prefilling_keeps_finished_pages():
    prompt = list(range(1, 41))
    async with fake_pair(prefill=PrefillConfig(chunk_tokens=8)) as pair:
        pair.prefill_gate.is_open = False
        doomed = asyncio.create_task(answer(pair.decode, make_request(prompt)))
        pair.prefill_gate.permits.release()
        pair.prefill_gate.permits.release()
        await until(lambda: pair.prefill_gate.num_steps == 2 and pair.prefill._roster.admitted[0].num_done == 16)
        doomed.cancel()
        await until(lambda: pair.decode.num_unfinished == 0)
        pair.prefill_gate.let_all()
        await until(lambda: pair.prefill.num_unfinished == 0)
        _, event = await collect(pair.decode, make_request(prompt))
        assert event.usage.num_cached_tokens >= 16


async def test_cancel_while_decoding_frees_within_one_step():
    async with fake_pair() as pair:
        async with aclosing(pair.decode.generate(make_request(PROMPT, 200))) as events:
            async for event in events:
                if isinstance(event, Tokens) and pair.decode_gate.num_steps >= 3:
                    break
        steps = pair.decode_gate.num_steps
        await until(lambda: pair.decode.num_unfinished == 0)
        assert pair.decode_gate.num_steps <= steps + 1
        assert pair.decode.load().num_free_pages == pair.decode.load().num_total_pages


async def test_many_abandoned_requests_leave_nothing_behind():
    async with fake_pair(prefill_blocks=40, decode_blocks=40) as pair:
        for round_ in range(30):
            tasks = [
                asyncio.create_task(answer(pair.decode, make_request([i + 1] * 9, 60, request_id=f"{round_}-{i}")))
                for i in range(4)
            ]
            for _ in range(round_):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)


# ── overload and impossible requests ─────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_with_a_hint():
    async with fake_pair(decode=DecodeConfig(max_batch=1, max_queue=1)) as pair:
        pair.decode_gate.is_open = False
        tasks = [asyncio.create_task(answer(pair.decode, make_request(PROMPT, request_id=str(i)))) for i in range(2)]
        await until(lambda: pair.decode.load().num_queued == 1)
        with pytest.raises(QueueFull) as refused:
            await answer(pair.decode, make_request(PROMPT, request_id="3"))
        assert refused.value.retry_after_s is not None
        pair.decode_gate.let_all()
        await asyncio.gather(*tasks)


async def test_a_full_prefill_queue_fails_the_request_as_retryable():
    config = PrefillConfig(max_queue=1, max_prompts=1)
    async with fake_pair(prefill=config, prefill_blocks=3) as pair:
        pair.prefill_gate.is_open = False
        tasks = [asyncio.create_task(collect(pair.decode, make_request(PROMPT, request_id=str(i)))) for i in range(3)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        _, event = next(iter(done)).result()
        assert isinstance(event, Failed)
        assert isinstance(event.error, QueueFull)
        assert event.error.retryable
        assert event.error.worker_id == "prefill-0"
        pair.prefill_gate.let_all()
        await asyncio.gather(*tasks)


async def test_what_never_fits_is_refused_at_once():
    async with fake_pair(decode_blocks=4, prefill_blocks=4) as pair:
        with pytest.raises(RequestNeverFits, match=r"needs? .*18 .* has 4"):
            await answer(pair.decode, make_request([1] * 20, 50))
        _, event = await collect(pair.decode, make_request([1] * 20, 1, pack=PackSpec("streaming_llm", 4, None, 1, 1)))
        assert isinstance(event.error, RequestNeverFits)  # decode could hold the packed KV, prefill not the exact


@pytest.mark.parametrize("prompt", [[256], [1, 2, 70_000], [-1], []])
async def test_tokens_the_model_does_not_have_are_refused_before_any_step(prompt):
    async with fake_pair() as pair:
        with pytest.raises(InvalidRequest):
            await answer(pair.decode, make_request(prompt))
        assert pair.prefill_gate.num_steps == 0
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)


async def test_draining_refuses_new_and_finishes_old():
    async with fake_pair() as pair:
        pair.decode_gate.is_open = False
        running = asyncio.create_task(answer(pair.decode, make_request(PROMPT)))
        await until(lambda: pair.decode.load().num_running == 1)
        pair.decode.drain()
        with pytest.raises(Draining):
            await answer(pair.decode, make_request(PROMPT, request_id="2"))
        pair.decode_gate.let_all()
        assert await running == fake_answer(PROMPT, 8)


async def test_a_deadline_ends_a_request_wherever_it_is():
    async with fake_pair() as pair:
        pair.prefill_gate.is_open = False
        _, event = await collect(pair.decode, make_request(PROMPT, deadline_s=0.05))
        assert isinstance(event.error, DeadlineExceeded)


# ── failures: each becomes exactly one terminal event ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_step_that_raises_fails_its_requests_not_the_worker(side):
    async with fake_pair() as pair:
        gate = pair.prefill_gate if side == "prefill" else pair.decode_gate
        gate.error = ValueError("boom")
        _, event = await collect(pair.decode, make_request(PROMPT))
        assert isinstance(event.error, InternalError)
        assert "boom" in event.error.message
        gate.error = None
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)


async def test_a_step_that_raises_for_a_reader_who_left_leaves_nothing_behind():
    async with fake_pair() as pair:
        pair.prefill_gate.is_open = False
        doomed = asyncio.create_task(answer(pair.decode, make_request(PROMPT)))
        await until(lambda: pair.prefill.load().num_running == 1)
        doomed.cancel()
        await until(lambda: pair.decode.num_unfinished == 0)
        pair.prefill_gate.error = ValueError("boom")
        pair.prefill_gate.let_all()
        await until(lambda: pair.prefill.num_unfinished == 0)
        pair.prefill_gate.error = None
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)


class Tampered:
    """Changes events on their way from prefill to decode."""

    def __init__(self, worker, tamper):
        self._worker, self._tamper = worker, tamper

    async def prefill(self, request):
        async with aclosing(self._worker.prefill(request)) as events:
            async for event in events:
                for changed in self._tamper(event):
                    if isinstance(changed, Exception):
                        raise changed
                    yield changed


def flip_byte(event):
    if isinstance(event, Chunk):
        data = bytearray(event.data)
        data[0] ^= 1
        return [Chunk(memoryview(data))]
    return [event]


def swap(kind, change):
    return lambda event: change(event) if isinstance(event, kind) else [event]


def renamed_codec(manifest):
    return encode_manifest(replace(decode_manifest(manifest), codec="zip"))


TAMPERS = {
    "flipped byte": (flip_byte, ShipmentCorrupt, "checksum"),
    "lost layer": (swap((LayerHeader, Chunk), lambda event: []), ShipmentCorrupt, "0 of 1 layers"),
    "lost manifest": (swap(Accepted, lambda event: []), ShipmentCorrupt, "before the manifest"),
    "foreign hash": (
        swap(Accepted, lambda event: [Accepted("other", b"\xff\xff")]),
        Exception,
        "compatibility hash is other",
    ),
    "garbled manifest": (
        swap(Accepted, lambda event: [Accepted(event.compatibility, b"\xff\xff\xff")]),
        ShipmentCorrupt,
        "parsed",
    ),
    "foreign codec": (
        swap(Accepted, lambda event: [Accepted(event.compatibility, renamed_codec(event.manifest))]),
        ShipmentIncompatible,
        "codec is 'zip'",
    ),
    "lying lengths": (
        swap(LayerHeader, lambda e: [LayerHeader(0, (10_000,), e.num_bytes, e.checksum)]),
        ShipmentCorrupt,
        "lengths",
    ),
    "too many heads": (
        swap(LayerHeader, lambda e: [LayerHeader(0, (1, 1), e.num_bytes, e.checksum)]),
        ShipmentCorrupt,
        "lengths",
    ),
    "too few tokens": (
        swap(LayerHeader, lambda e: [LayerHeader(0, (1,), e.num_bytes, e.checksum)]),
        ShipmentCorrupt,
        "due",
    ),
    "no end": (swap(Shipped, lambda event: []), ShipmentCorrupt, "without saying so"),
    "two first tokens": (swap(FirstToken, lambda event: [event, event]), ShipmentCorrupt, "which had one"),
    "a token of another model": (
        swap(FirstToken, lambda event: [FirstToken(Token(FAKE_VOCABULARY), 0)]),
        ShipmentCorrupt,
        f"vocabulary ends at {FAKE_VOCABULARY - 1}",
    ),
    "no first token": (swap(FirstToken, lambda event: []), ShipmentCorrupt, "first token"),
    "death": (swap(Shipped, lambda event: [WorkerLost("gone")]), WorkerLost, "gone"),
    "bug": (swap(Chunk, lambda event: [KeyError("x")]), InternalError, "KeyError"),
}


@pytest.mark.parametrize("tamper", TAMPERS)
async def test_a_foreign_shipment_is_a_typed_error_never_a_wrong_answer(tamper):
    change, kind, message = TAMPERS[tamper]
    async with fake_pair(client=lambda worker: Tampered(worker, change)) as pair:
        tokens, event = await collect(pair.decode, make_request(PROMPT))
        assert isinstance(event, Failed)
        assert isinstance(event.error, kind)
        assert message in event.error.message
        assert event.error.worker_id == "prefill-0" or kind is InternalError
        assert tokens in ([], fake_answer(PROMPT, 1))
        assert pair.decode.load().num_free_pages == pair.decode.load().num_total_pages


async def test_an_empty_head_has_nothing_to_evict():
    """It has no page either: the next token would go into somebody else's."""
    empty = {LayerHeader: [LayerHeader(0, (0,), 0, checksum(b""))], Chunk: [Chunk(b"")]}
    async with fake_pair(client=lambda worker: Tampered(worker, lambda e: empty.get(type(e), [e]))) as pair:
        _, event = await collect(pair.decode, make_request(PROMPT * 2, pack=evicting(8, 0.5)))
        assert isinstance(event.error, ShipmentCorrupt)
        assert "lengths" in event.error.message


async def test_a_silent_prefill_worker_is_given_up():
    async with fake_pair(decode=DecodeConfig(prefill_timeout_s=0.05)) as pair:
        pair.prefill_gate.is_open = False
        _, event = await collect(pair.decode, make_request(PROMPT))
        assert isinstance(event.error, WorkerLost)
        assert "silent" in event.error.message
