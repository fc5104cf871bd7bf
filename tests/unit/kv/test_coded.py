"""The coded pool: what a plain pool does, in less memory, and within the codec's error."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from packlight.compress.codecs.fp8 import FP8Codec
from packlight.compress.codecs.kivi import Int4Codec, Int8Codec
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.parts import CODECS
from packlight.core.errors import ConfigError, InternalError
from packlight.core.types import ModelSpec
from packlight.kv.coded import CodedPool
from packlight.kv.pool import KVPool, PackedPool

LAYERS, HEADS, PAGE, DIM = 2, 2, 4, 8
NUM_BLOCKS = 3
NUM_PAGES = NUM_BLOCKS * LAYERS * HEADS
SPEC = ModelSpec("m", "f", LAYERS, HEADS, DIM, 10, 100, (), "float32", (None,) * LAYERS)


def make_pool(codec, *, max_open_pages=NUM_PAGES, dtype=torch.float32):
    return CodedPool(SPEC, codec, num_blocks=NUM_BLOCKS, max_open_pages=max_open_pages, page_size=PAGE, dtype=dtype)


def plain_pool(dtype=torch.float32):
    return KVPool(SPEC, num_blocks=NUM_BLOCKS, page_size=PAGE, dtype=dtype)


def gathered(pool: PackedPool, pages):
    k_XPD, v_XPD = torch.full((2, len(pages), PAGE, DIM), torch.nan, dtype=pool.dtype)
    pool.gather(torch.tensor(pages, dtype=torch.int64), k_XPD, v_XPD)
    return k_XPD, v_XPD


class PoolMachine(RuleBasedStateMachine):
    """Pages are written, grown, overwritten and released at random, in a coded pool and in a plain one.

    What is stored is also kept here as it must read: exact while a page is open, through the codec once it is full."""

    codec = NativeCodec()

    def __init__(self):
        super().__init__()
        self.coded, self.plain = make_pool(self.codec), plain_pool()
        self.num_tokens: dict[int, int] = {}  # of every page in use
        self.expected = torch.zeros(2, NUM_PAGES, PAGE, DIM)
        self.is_coded = [False] * NUM_PAGES
        self.generator = torch.Generator().manual_seed(0)

    @rule(data=st.data())
    def write(self, data):
        pages = data.draw(st.lists(st.integers(0, NUM_PAGES - 1), unique=True, max_size=5))
        counts = data.draw(st.lists(st.integers(1, PAGE), min_size=len(pages), max_size=len(pages)))
        k_XPD, v_XPD = self._randn(len(pages), PAGE, DIM)
        num_tokens = None if all(count == PAGE for count in counts) else torch.tensor(counts, dtype=torch.int64)
        for pool in (self.coded, self.plain):
            pool.write_pages(torch.tensor(pages, dtype=torch.int64), k_XPD, v_XPD, num_tokens)
        for page, count, k_PD, v_PD in zip(pages, counts, k_XPD, v_XPD, strict=True):
            self.num_tokens[page] = count
            self.expected[:, page] = torch.stack([k_PD, v_PD])
            self._settle(page, count == PAGE)

    @rule(data=st.data())
    def grow(self, data):
        """One token each, on fresh pages too."""
        room = [page for page in range(NUM_PAGES) if self.num_tokens.get(page, 0) < PAGE]
        pages = data.draw(st.lists(st.sampled_from(room), unique=True, max_size=6)) if room else []
        self._append({page: self.num_tokens.get(page, 0) for page in pages})

    @precondition(lambda self: self.num_tokens)
    @rule(data=st.data())
    def overwrite(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.num_tokens)), unique=True, max_size=4))
        self._append({page: data.draw(st.integers(0, self.num_tokens[page] - 1)) for page in pages})

    @precondition(lambda self: self.num_tokens)
    @rule(data=st.data())
    def release(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.num_tokens)), unique=True))
        for pool in (self.coded, self.plain):
            pool.release(np.array(pages, dtype=np.int32))
        for page in pages:
            del self.num_tokens[page]
            self.is_coded[page] = False

    @invariant()
    def reads_as_expected(self):
        pages = sorted(self.num_tokens)
        if not pages:
            return
        pages = [*pages, pages[0]]  # the same page twice, as padding does
        exact = gathered(self.plain, pages)
        for got, true, expected_NPD in zip(gathered(self.coded, pages), exact, self.expected, strict=True):
            assert got.isfinite().all()
            for index, page in enumerate(pages):
                count = self.num_tokens[page]
                torch.testing.assert_close(got[index, :count], expected_NPD[page, :count], rtol=1e-5, atol=1e-5)
                if isinstance(self.codec, NativeCodec):
                    assert torch.equal(got[index, :count], true[index, :count])

    @invariant()
    def open_pages_are_those_that_are_not_full(self):
        assert self.coded.num_open_pages == sum(not self.is_coded[page] for page in self.num_tokens)

    def _append(self, offset_of):
        pages = torch.tensor(list(offset_of), dtype=torch.int64)
        slots = pages * PAGE + torch.tensor(list(offset_of.values()), dtype=torch.int64)
        k_XD, v_XD = self._randn(len(offset_of), DIM)
        for pool in (self.coded, self.plain):
            pool.append(slots, k_XD, v_XD)
        for (page, offset), k_D, v_D in zip(offset_of.items(), k_XD, v_XD, strict=True):
            self.num_tokens[page] = max(self.num_tokens.get(page, 0), offset + 1)
            self.expected[:, page, offset] = torch.stack([k_D, v_D])
            self._settle(page, self.is_coded[page] or offset == PAGE - 1)

    def _settle(self, page, is_coded):
        self.is_coded[page] = is_coded
        if is_coded:
            k_1PD, v_1PD = self.expected[0, page : page + 1], self.expected[1, page : page + 1]
            decoded = self.codec.decode(self.codec.encode(k_1PD, v_1PD, [1]), PAGE, DIM, torch.float32)
            self.expected[:, page] = torch.cat(decoded)

    def _randn(self, *shape):
        return torch.randn(2, *shape, generator=self.generator)


class Int8Machine(PoolMachine):
    codec = Int8Codec()


class FP8Machine(PoolMachine):
    codec = FP8Codec()


PoolMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestNative = PoolMachine.TestCase
Int8Machine.TestCase.settings = FP8Machine.TestCase.settings = PoolMachine.TestCase.settings
TestInt8, TestFP8 = Int8Machine.TestCase, FP8Machine.TestCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "limit"), [("native", 0), ("int8", 0.02), ("fp8", 0.05), ("turboquant4", 0.3)])
def test_a_growing_head_reads_within_the_codecs_error(name, limit, dtype):
    """Token by token over page borders; the open page is exact all along."""
    pool, pages = make_pool(CODECS.load(name)(), max_open_pages=1, dtype=dtype), [7, 2, 9]
    k_SD, v_SD = torch.randn(2, 3 * PAGE - 1, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    for token in range(len(k_SD)):
        slot = torch.tensor([pages[token // PAGE] * PAGE + token % PAGE])
        pool.append(slot, k_SD[token : token + 1], v_SD[token : token + 1])
        stored, whole = token + 1, (token + 1) // PAGE * PAGE
        for got_XPD, true_SD in zip(gathered(pool, pages), (k_SD, v_SD), strict=True):
            got_SD = got_XPD.flatten(0, 1)[:stored]
            assert torch.equal(got_SD[whole:], true_SD[whole:stored])
            error = (got_SD - true_SD[:stored]).float().square().mean().sqrt()
            assert error <= limit * true_SD[:stored].float().square().mean().sqrt()


def test_records_are_kept_as_they_came():
    """Those of a shipment: its FP8 scale is the head's, not the page's, and coding anew would move every value."""
    codec, pages = FP8Codec(), torch.tensor([5, 3])
    pool, (k_XPD, v_XPD) = make_pool(codec), torch.randn(2, 2, PAGE, DIM)
    k_XPD[1] *= 100
    records = codec.encode(k_XPD, v_XPD, [2])
    pool.write_records(pages, records)
    for got, shipped in zip(gathered(pool, [5, 3]), codec.decode(records, PAGE, DIM, torch.float32), strict=True):
        assert torch.equal(got, shipped)
    assert pool.num_open_pages == 0


def test_more_open_pages_than_promised_is_our_bug():
    pool = make_pool(Int8Codec(), max_open_pages=2)
    pool.append(torch.tensor([0, PAGE]), *torch.zeros(2, 2, DIM))
    with pytest.raises(InternalError, match="1 more pages to open, 0 of 2 places are free"):
        pool.append(torch.tensor([2 * PAGE]), *torch.zeros(2, 1, DIM))
    pool.release(np.array([0], dtype=np.int32))
    pool.append(torch.tensor([2 * PAGE]), *torch.zeros(2, 1, DIM))


def test_a_reopened_place_does_not_show_the_page_before():
    pool = make_pool(Int8Codec(), max_open_pages=1)
    pool.write_pages(torch.tensor([4]), *torch.full((2, 1, PAGE, DIM), 1e30), torch.tensor([3]))
    pool.release(np.array([4], dtype=np.int32))
    pool.append(torch.tensor([4 * PAGE]), *torch.ones(2, 1, DIM))
    for got in gathered(pool, [4]):
        assert torch.equal(got[0], torch.cat([torch.ones(1, DIM), torch.zeros(PAGE - 1, DIM)]))


def test_pages_never_written_read_as_zeros():
    for got in gathered(make_pool(Int4Codec()), [0, 11]):
        assert not got.any()


SMOLLM2 = ModelSpec("m", "f", 30, 3, 64, 10, 100, (), "bfloat16", (None,) * 30)


@pytest.mark.parametrize(("name", "times"), [("native", 0.99), ("fp8", 1.97), ("int4", 2.85), ("turboquant4", 4.2)])
def test_the_same_memory_holds_more_pages(name, times):
    """1 GiB, SmolLM2's shape in bfloat16, 16 rows: open pages and states are paid for."""
    options = {"memory_bytes": 2**30, "page_size": 16, "dtype": torch.bfloat16}
    plain = KVPool.of_size(SMOLLM2, **options)
    pool = CodedPool.of_size(SMOLLM2, CODECS.load(name)(), max_open_pages=16 * 90, **options)
    assert pool.num_head_pages >= times * plain.num_head_pages
    held = [tensor for tensor in vars(pool).values() if isinstance(tensor, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in held) == pool.memory_bytes + 8 * 16 * 90  # the list of free places
    assert 2**30 - 90 * 4096 <= pool.memory_bytes <= 2**30
    assert plain.memory_bytes <= 2**30


def test_memory_that_is_too_small_is_refused_with_the_figures():
    with pytest.raises(
        ConfigError, match="one block of 16 tokens needs 185400 and 90 open pages need 368640, got 1000"
    ):
        CodedPool.of_size(SMOLLM2, FP8Codec(), memory_bytes=1000, max_open_pages=90, page_size=16, dtype=torch.bfloat16)
