"""From the host to a GPU's pages beside what it computes: the same bytes, and nobody reads or writes too early."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from packlight.compress.base import Selection
from packlight.compress.pack import pack
from packlight.compress.parts import CODECS
from packlight.compress.payload import encode_layer, tokens_per_page
from packlight.core.types import GenerateRequest, PackSpec, SamplingParams, StopRules
from packlight.decode.memory import DecodeMemory
from packlight.decode.unpack import Unpacker
from packlight.decode.uploads import Uploads
from packlight.kv.coded import CodedPool
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries
from packlight.models.fake_spec import fake_spec

pytestmark = pytest.mark.gpu

PAGE, HEADS, DIM, LAYERS, BLOCKS = 16, 4, 64, 2, 64
SPEC = replace(fake_spec(), num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, sliding_windows=(None,) * LAYERS)
SLEEP_CYCLES = 200_000_000  # about a tenth of a second
ARRIVALS = [(77, 0, 16, 201), (1, 15, 17, 160), (64, 64, 64, 64)]
POOLS = ["native", "fp8_unscaled", "fp8", "int8", "turboquant4"]


def make_pool(codec="native"):
    how = {"num_blocks": BLOCKS, "page_size": PAGE, "dtype": torch.bfloat16, "device": "cuda"}
    if codec == "native":
        return KVPool(SPEC, **how)
    return FP8Pool(SPEC, **how) if codec == "fp8_unscaled" else CodedPool(
        SPEC, CODECS.load(codec)(), max_open_pages=64, **how
    )  # fmt: skip


def payload_of(codec, lengths):
    """On the host, as it comes from another process."""
    generator = torch.Generator().manual_seed(sum(lengths))
    k_KSD, v_KSD = torch.randn(2, HEADS, max(lengths) + 1, DIM, generator=generator).bfloat16()
    packed = pack(k_KSD, v_KSD, Selection(tuple(torch.arange(length) for length in lengths), 1.0), PAGE)
    return encode_layer(CODECS.load(codec)(), packed)


def arrivals(codec):
    """(pages, lengths, payload) of some layers."""
    start = 0
    for lengths in ARRIVALS:
        num_pages = len(tokens_per_page(lengths, PAGE))
        yield torch.arange(start, start + num_pages), lengths, payload_of(codec, lengths)
        start += num_pages


def read(pool, summaries, num_pages):
    pages_X = torch.arange(num_pages, device="cuda")
    k_XPD, v_XPD = torch.empty(2, num_pages, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
    pool.gather(pages_X, k_XPD, v_XPD)
    return torch.cat([k_XPD.flatten(1), v_XPD.flatten(1), summaries.read(pages_X)], dim=1).view(torch.int16).cpu()


@pytest.mark.parametrize("pool_codec", POOLS)
@pytest.mark.parametrize("codec", list(CODECS))
def test_bytes_equal_plain_writing_and_nothing_waits(pool_codec, codec, no_waiting):
    plain, pool = (make_pool(pool_codec) for _ in range(2))
    plain_summaries, summaries = (PageSummaries(plain.num_head_pages, DIM, plain.dtype, "cuda") for _ in range(2))
    plainly, store = (Unpacker(each, codec, pool_codec=pool_codec).store for each in (plain, pool))
    layers, uploads = list(arrivals(codec)), Uploads.into(pool)
    for pages_X, lengths, payload in layers:
        plainly(pages_X, lengths, payload, summaries=plain_summaries)
        # What is compiled or allocated at first may wait.
        at_first = partial(store, pages_X, lengths, summaries=summaries)
        uploads.start(torch.zeros_like(payload), at_first).synchronize()
        pool.release(pages_X.int().numpy())
    uploads.freed()
    torch.cuda.synchronize()
    no_waiting()
    for pages_X, lengths, payload in layers:
        done = uploads.start(payload, partial(store, pages_X, lengths, summaries=summaries))
        payload.fill_(0xDB)
    torch.cuda.set_sync_debug_mode("default")
    done.synchronize()
    num_pages = int(layers[-1][0][-1]) + 1
    assert torch.equal(read(pool, summaries, num_pages), read(plain, plain_summaries, num_pages))


@pytest.fixture
def memory():
    return DecodeMemory(SPEC, make_pool(), num_rows=4)


def opened(memory):
    request = GenerateRequest(
        request_id="r", token_ids=(1,) * 64, num_prompt_tokens=64, sampling=SamplingParams(),
        stop=StopRules(max_tokens=4), pack=PackSpec(), prefill_id="p", deadline_s=1.0,
    )  # fmt: skip
    holding = memory.plan(request)
    assert memory.open(holding)
    return holding


def fill(memory, holding, value, *, cycles=0):
    """All that the first layer's pages hold becomes `value`, after so many cycles. Returns the pages."""
    pages_X = memory.claim(holding, 0, [64] * HEADS)
    payload = torch.full((2, len(pages_X), PAGE, DIM), value, dtype=torch.bfloat16).flatten().view(torch.uint8)
    store = Unpacker(memory.pool, "native", pool_codec="native").store

    def slowly(at):
        torch.cuda._sleep(cycles)
        store(pages_X, [64] * HEADS, at, summaries=None)

    memory.fill(holding, payload, slowly)
    return pages_X


def values_in(memory, pages_X):
    torch.cuda.synchronize()
    return set(memory.pool.k_pages[pages_X.cuda()].flatten().tolist())


def test_kv_arrives_while_the_gpu_computes(memory):
    holding, computed = opened(memory), torch.cuda.Event()
    fill(memory, holding, 3.0)
    holding.filled.synchronize()  # pinned memory is there
    torch.cuda._sleep(5 * SLEEP_CYCLES)
    computed.record()
    pages_X = fill(memory, opened(memory), 4.0)
    memory.uploads._under_way[-1].done.synchronize()
    assert not computed.query()
    assert values_in(memory, pages_X) == {4.0}


def test_pages_that_go_back_early_are_computed_on_after_the_copy(memory):
    holding = opened(memory)
    pages_X = fill(memory, holding, 3.0, cycles=SLEEP_CYCLES)
    on_device_X = pages_X.cuda()
    memory.close(holding)
    memory.pool.k_pages[on_device_X] = 5.0
    assert values_in(memory, pages_X) == {5.0}


def test_pages_that_go_back_early_are_filled_anew_after_the_copy(memory):
    holding = opened(memory)
    pages_X = fill(memory, holding, 3.0, cycles=SLEEP_CYCLES)
    memory.close(holding)
    again_X = fill(memory, opened(memory), 6.0)
    assert set(again_X.tolist()) == set(pages_X.tolist())
    assert values_in(memory, again_X) == {6.0}


def test_a_copy_comes_after_the_steps_that_had_its_pages(memory):
    holding = opened(memory)
    pages_X = fill(memory, holding, 3.0)
    holding.filled.synchronize()
    on_device_X = pages_X.cuda()
    torch.cuda._sleep(SLEEP_CYCLES)
    memory.pool.k_pages[on_device_X] = 5.0
    memory.settle(holding)
    memory.close(holding)
    again_X = fill(memory, opened(memory), 6.0)
    assert set(again_X.tolist()) == set(pages_X.tolist())
    assert values_in(memory, again_X) == {6.0}


def test_pinned_memory_is_not_filled_again_before_it_was_read(memory):
    uploads = Uploads(memory.uploads._side, limit_bytes=64 << 20)
    found = torch.zeros(64, device="cuda", dtype=torch.uint8)

    def look(number, at):
        torch.cuda._sleep(SLEEP_CYCLES // 100)
        found[number] = at.to("cuda", non_blocking=True).max()

    for number in range(64):
        done = uploads.start(torch.full((4 << 20,), number, dtype=torch.uint8), partial(look, number))
        if (first := uploads.in_the_way) is not None:
            first.synchronize()
    done.synchronize()
    assert found.tolist() == list(range(64))


def test_a_payload_that_is_pinned_is_read_where_it_lies(memory):
    payload, seen = torch.full((1 << 20,), 7, dtype=torch.uint8).pin_memory(), []
    memory.uploads.start(payload, seen.append).synchronize()
    assert seen[0] is payload
