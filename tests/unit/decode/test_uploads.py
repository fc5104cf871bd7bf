"""Layers on their way into a device's pages: the same bytes as without one, and no memory is used again too early."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.base import Selection
from packlight.compress.pack import pack
from packlight.compress.parts import CODECS
from packlight.compress.payload import decode_layer, encode_layer, split_payload, tokens_per_page
from packlight.core.types import GenerateRequest, PackSpec, SamplingParams, StopRules
from packlight.decode import unpack
from packlight.decode.memory import DecodeMemory
from packlight.decode.unpack import Unpacker
from packlight.decode.uploads import Uploads
from packlight.kv import coded
from packlight.kv.coded import CodedPool
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries
from packlight.models.fake_spec import fake_spec
from tests.support.deferred_side import POISON, DeferredSide
from tests.support.device_tensors import DeviceTensors

PAGE, DIM, HEADS, LAYERS, BLOCKS = 4, 8, 2, 2, 12
NUM_PAGES = BLOCKS * LAYERS * HEADS
SPEC = replace(fake_spec(), num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, sliding_windows=(None,) * LAYERS)
LIMIT_BYTES = 4096
POOLS = ["native", "fp8_unscaled", "fp8", "int8", "turboquant4"]


def make_pool(codec="native"):
    """Nothing in it is zero."""
    shape = {"num_blocks": BLOCKS, "page_size": PAGE, "dtype": torch.float32}
    if codec == "native":
        pool = KVPool(SPEC, **shape)
        for memory in (pool.k, pool.v):
            memory.fill_(1e4)
    elif codec == "fp8_unscaled":
        pool = FP8Pool(SPEC, **shape)
        for memory in (pool.k_pages, pool.v_pages):
            memory.view(torch.uint8).fill_(0x55)
    else:
        pool = CodedPool(SPEC, CODECS.load(codec)(), max_open_pages=16, **shape)
        for memory in pool.memory.k_open_OPD, pool.memory.v_open_OPD, pool.memory.records_NR:
            memory.fill_(77)
    return pool


def payload_of(codec, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_KSD, v_KSD = torch.randn(2, HEADS, max(lengths) + 1, DIM, generator=generator)
    packed = pack(k_KSD, v_KSD, Selection(tuple(torch.arange(length) for length in lengths), 1.0), PAGE)
    return encode_layer(CODECS.load(codec)(), packed)


def store_plainly(pool, pool_codec, codec_name, pages_X, lengths, payload, summaries):
    """The obvious way, by what pools take from anybody."""
    codec, dims, num_tokens_X = CODECS.load(codec_name)(), (PAGE, DIM, torch.float32), tokens_per_page(lengths, PAGE)
    k_XPD, v_XPD = decode_layer(codec, payload, lengths, *dims)
    if pool_codec == codec_name and isinstance(pool, CodedPool):
        split = split_payload(codec, payload, lengths, *dims)
        pool.write_records(pages_X[split.pages], split.records)
        rest = split.open_pages
        pool.write_pages(pages_X[rest], k_XPD[rest], v_XPD[rest], num_tokens_X[rest])
    else:
        pool.write_pages(pages_X, k_XPD, v_XPD, num_tokens_X)
    summaries.build(pages_X, k_XPD, num_tokens_X)


def read(pool, pages_X, summaries):
    k_XPD, v_XPD = torch.full((2, len(pages_X), PAGE, DIM), torch.nan)
    pool.gather(pages_X, k_XPD, v_XPD)
    return torch.cat([k_XPD.flatten(1), v_XPD.flatten(1), summaries.read(pages_X)], dim=1)


lengths_of_heads = st.lists(st.integers(0, 3 * PAGE + 1), min_size=HEADS, max_size=HEADS)


@pytest.mark.parametrize("pool_codec", POOLS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_pages_are_what_plain_writing_makes_of_them(pool_codec, data):
    """By every codec; layers begin and end in any order that a stream allows, and buffers are used again meanwhile."""
    codec_name = data.draw(st.sampled_from(list(CODECS)))
    layers = data.draw(st.lists(lengths_of_heads, min_size=1, max_size=4))
    pools = [make_pool(pool_codec) for _ in range(2)]
    all_summaries = [PageSummaries(NUM_PAGES, DIM, torch.float32) for _ in pools]
    side = DeferredSide()
    uploads, unpacker = Uploads(side, limit_bytes=512), Unpacker(pools[0], codec_name, pool_codec=pool_codec)
    all_pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0))
    arriving, used = torch.empty(1 << 14, dtype=torch.uint8), 0
    for number, lengths in enumerate(layers):
        num_pages = len(tokens_per_page(lengths, PAGE))
        pages_X, used = all_pages[used : used + num_pages], used + num_pages
        payload = payload_of(codec_name, lengths, seed=number)
        store_plainly(pools[1], pool_codec, codec_name, pages_X, lengths, payload, all_summaries[1])
        arrived = arriving[: len(payload)].copy_(payload)
        done = uploads.start(
            arrived, lambda at, pages=pages_X, n=lengths: unpacker.store(pages, n, at, summaries=all_summaries[0])
        )
        assert not done.query()
        arriving.fill_(POISON)
        side.finish(data.draw(st.integers(0, len(side.begun))))
    side.finish()
    assert done.query()
    got, due = (read(pool, all_pages[:used], each) for pool, each in zip(pools, all_summaries, strict=True))
    assert torch.equal(got, due)


# ── nothing waits for the device ─────────────────────────────────────────────────────────────────────────────────────


def tensors_of(pool):
    return list(pool.memory) if isinstance(pool, CodedPool) else [pool.k_pages, pool.v_pages]


@pytest.mark.parametrize("pool_codec", POOLS)
@pytest.mark.parametrize("codec_name", list(CODECS))
def test_storing_does_not_wait_for_the_device(pool_codec, codec_name, monkeypatch):
    lengths, pool, summaries = (9, 7), make_pool(pool_codec), PageSummaries(NUM_PAGES, DIM, torch.float32)
    payload, unpacker = payload_of(codec_name, lengths), Unpacker(pool, codec_name, pool_codec=pool_codec)
    device = DeviceTensors(payload, tensors_of(pool), summaries.bounds_NE)
    for module in (unpack, coded):
        monkeypatch.setattr(module, "moved", device.move)
    with device:
        unpacker.store(torch.arange(5), lengths, payload, summaries=summaries)
        with pytest.raises(RuntimeError, match="waits for the device"):
            bool(tensors_of(pool)[0][0].flatten()[0])  # what this test relies on


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def side():
    return DeferredSide()


@pytest.fixture
def uploads(side):
    return Uploads(side, limit_bytes=LIMIT_BYTES)


def layer(number, size=1024):
    return torch.full((size,), number, dtype=torch.uint8)


class Stored(list):
    """What the device found where the bytes were said to lie."""

    def __call__(self, payload):
        self.append(payload.clone())


def test_pinned_memory_is_used_again_when_it_was_read_and_not_before(uploads, side):
    stored = Stored()
    for number in range(40):
        uploads.start(layer(number), stored)
        if number % 3 == 2:
            side.finish(3)
    side.finish()
    assert [set(each.tolist()) for each in stored] == [{number} for number in range(40)]
    assert side.num_allocated_bytes <= LIMIT_BYTES


def test_what_comes_too_fast_waits_for_what_came_first(uploads, side):
    begun = [uploads.start(layer(number), Stored()) for number in range(4)]
    assert uploads.in_the_way is None
    begun.append(uploads.start(layer(4), Stored()))
    assert uploads.in_the_way is begun[0]
    side.finish(1)
    assert uploads.in_the_way is None


def test_a_layer_larger_than_all_the_memory_goes_alone(uploads, side):
    stored = Stored()
    done = uploads.start(layer(9, 5 * LIMIT_BYTES), stored)
    assert uploads.in_the_way is done
    side.finish()
    assert uploads.in_the_way is None
    assert torch.equal(stored[0], layer(9, 5 * LIMIT_BYTES))


def test_pinned_payloads_are_not_copied(uploads, side, monkeypatch):
    """Of a prefill worker of this process: they stay as they are while somebody holds them."""
    payload, stored = layer(7), []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    uploads.start(payload, stored.append)
    side.finish()
    assert stored[0] is payload
    assert side.num_allocated_bytes == 0
    reader = weakref.ref(payload)
    del payload, stored[0]
    assert reader() is not None
    uploads.forget_done()
    assert reader() is None


def test_steps_come_after_what_failed_half_way(uploads, side):
    side.refuses = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        uploads.start(layer(0), Stored())
    assert side.num_held == 1


# ── pages that go back while they are filled ─────────────────────────────────────────────────────────────────────────


def make_memory(side):
    memory = DecodeMemory(SPEC, make_pool(), num_rows=4)
    memory.uploads = Uploads(side, limit_bytes=LIMIT_BYTES)
    return memory


def opened(memory, num_tokens=8):
    request = GenerateRequest(
        request_id="r", token_ids=(1,) * num_tokens, num_prompt_tokens=num_tokens, sampling=SamplingParams(),
        stop=StopRules(max_tokens=4), pack=PackSpec(), prefill_id="p", deadline_s=1.0,
    )  # fmt: skip
    holding = memory.plan(request)
    assert memory.open(holding)
    return holding


def fill(memory, holding, layer, value, num_tokens=8):
    """All that the layer's pages hold is `value`. Returns the pages."""
    pages_X = memory.claim(holding, layer, [num_tokens] * HEADS)
    memory.fill(holding, layer_payload(value, len(pages_X)), lambda at: memory.pool.write_pages(pages_X, *numbers(at)))
    return pages_X


def layer_payload(value, num_pages):
    return torch.full((2, num_pages, PAGE, DIM), float(value)).flatten().view(torch.uint8)


def numbers(payload):
    return payload.view(torch.float32).view(2, -1, PAGE, DIM)


def test_pages_that_go_back_early_are_written_by_their_next_owner_last(side):
    """Whether that one's layers arrive, or steps compute its tokens."""
    memory = make_memory(side)
    first = opened(memory)
    pages_X = fill(memory, first, 0, 1)
    memory.close(first)
    assert memory.book.num_held == 0
    assert side.num_held == 1, "steps were not put behind the copy"
    second = opened(memory)
    again_X = fill(memory, second, 0, 2)
    assert set(again_X.tolist()) == set(pages_X.tolist())
    side.finish()
    side.compute()
    assert torch.equal(memory.pool.k_pages[again_X], torch.full((len(again_X), PAGE, DIM), 2.0))
    memory.close(second)


def test_pages_that_are_filled_go_back_without_holding_steps_up(side):
    memory = make_memory(side)
    holding = opened(memory)
    for number in range(LAYERS):
        fill(memory, holding, number, number)
    side.finish()
    memory.settle(holding)
    memory.close(holding)
    assert side.num_held == 0


def test_copies_come_after_the_steps_that_had_their_pages(side):
    """The fake refuses an earlier moment than the last one."""
    memory = make_memory(side)
    before = side.computed()
    memory.close(opened(memory))
    memory.close(opened(memory))
    assert side.computed() > before + 2
    memory.uploads.freed()
    fill(memory, opened(memory), 0, 1)
    side.finish()


def test_a_device_that_is_gone_keeps_nobody_from_closing(side, monkeypatch):
    memory = make_memory(side)
    holding = opened(memory)
    fill(memory, holding, 0, 1)
    side.begun.popleft().fail()
    monkeypatch.setattr(side, "computed", side.gone)
    memory.close(holding)
    memory.check_idle()
    memory.check([])


def test_on_a_cpu_pages_are_filled_at_once_from_where_the_bytes_lie():
    memory = DecodeMemory(SPEC, make_pool(), num_rows=1)
    assert memory.uploads is None
    holding, payload, seen = opened(memory), layer(1), []
    memory.fill(holding, payload, seen.append)
    assert seen[0] is payload
    assert memory.in_the_way is None
    assert holding.filled is None
    memory.close(holding)


def test_open_places_are_known_on_the_host():
    """A place that is given back on one stream and taken on another must not be read from a stream's memory."""
    pool = make_pool("int8")
    assert pool._free_places.device.type == "cpu"
    pool.fill_open(torch.tensor([3, 5]), *torch.ones(2, 2, PAGE, DIM))
    assert pool.num_open_pages == 2
    pool.release(np.array([3, 5], dtype=np.int32))
    assert pool.num_open_pages == 0
